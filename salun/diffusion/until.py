"""Training until a goal is reached: probes on the way, a rate that follows them, the smallest change at last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from salun.diffusion.decisions import PAIR, SETTLING, Decision, Phase, best_of, decide
from salun.diffusion.goal import PREFIX, Goal, Probed
from salun.masking.training_state import LossRow

if TYPE_CHECKING:
    from torch import Tensor

STRENGTHS = (0.85, 0.7, 0.55, 0.4, 0.25)  # of a smaller change
HARM_POWER = 1.5  # drift grows about as s^1.5 with the strength s: 0.79 at 0.85, 0.59 at 0.7 on the bundled model
SAFE, LOWEST, LOOKS = 0.95, 0.4, 3  # to harm as little as allowed: part of that, the least strength, and looks at most
WEAKER = (0.5, 0.25, 0.1)  # tried where the model is wrecked
LESS = 0.8  # of the harm at the full strength is left at the first of the smaller ones
BASE, OFTEN = 0.2, 50.0  # how often a retain sample is drawn: at least, and at most by how far it moved, squared
MOVED, TRIED = f"{PREFIX}moved ", f"{PREFIX}tried "  # columns of a history
STRENGTH = f"{PREFIX}strength"  # in each row with a probe
KEPT, EARLIER, LOST = f"{PREFIX}kept", f"{PREFIX}earlier", f"{PREFIX}lost"
RARER = 0.25  # how often a concept that is gone, its anchor shown, is drawn, relative to another one


class Probe(Protocol):
    """Looks at the live network's weights."""

    def __call__(self, step: int, *, thorough: bool, drift: bool, grown: bool) -> Probed:
        """Which are those after a step. thorough: for a decision at last. drift: measure it too. grown: of `Decision`.

        A thorough look at a model without the concept measures the harm to other images.
        """

    def again(self, step: int, strength: float, *, harm: bool) -> Probed:
        """Which are now those of a smaller strength: compares them with the last thorough look. harm: measure it."""

    def moved(self, *, harmed: bool) -> list[float]:
        """How far the prediction of each retain sample moved, relative to their mean.

        Args:
            harmed: Whether other images were harmed, for which further retain samples are taken.
        """


@dataclass
class Until:
    """A training's way to its goal; the `Watch` of the training loop.

    Args:
        every: Steps between probes.
        budget: Steps at most.
        lr: Learning rate to begin with; None for one that is measured.
        probe: Looks at the live network.
        at_strength: Context manager: the live network has the weights θ₀ + s·(θ − θ₀) of a strength s.
        concepts: How many.
        guided: Whether the method's target can move, as a goal wants it.
        redraws: Whether the method draws retain samples by how far they moved.
        write: Keeps the weights after a step, which may be taken at the end; None where that cannot be done.
        now: The last decision.
        retain_frequencies: How often each retain sample is drawn, relative to each other: those whose predictions
            moved, more often. None for equally often.
    """

    goal: Goal
    every: int
    budget: int
    probe: Probe
    at_strength: Callable[[float], AbstractContextManager[None]]
    concepts: int = 1
    lr: float | None = None
    guided: bool = True
    redraws: bool = True
    write: Callable[[Mapping[str, Tensor], int], None] | None = None
    now: Decision = field(init=False)
    retain_frequencies: list[float] | None = None

    def __post_init__(self) -> None:
        self.now = self.decision([])

    def decision(self, history: list[LossRow]) -> Decision:
        """What follows from the probes in a history."""
        return decide(self.goal, probes_of(history), self.every, self.budget, self.guided)

    def best(self, history: list[LossRow]) -> Probed | None:
        """The probe of the weights that are nearest to the goal so far; see `best_of`."""
        return best_of(self.goal, probes_of(history), self.every, self.budget, self.guided)

    def keep(self, history: list[LossRow], masters: Mapping[str, Tensor]) -> None:
        """Keep the weights of now where they are the best so far and training continues."""
        best = self.best(history) if STRENGTH in history[-1] else None
        if self.write is not None and best is not None and best.step == len(history) and not self.stops(history):
            self.write(masters, best.step)

    def before(self, history: list[LossRow]) -> float:
        """Take note of what was decided; the learning rate of the next step."""
        assert self.lr is not None
        self.now = self.decision(history)
        self.retain_frequencies = _frequencies(history)
        taken = len(history) - self.now.start
        falling = 1 - taken / self.now.length if self.now.phase is Phase.SETTLE else 1.0
        return self.lr * self.now.factor * falling

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """With more weight on the retain loss where other images were harmed."""
        return {**weights, "retain": weights.get("retain", 1.0) * self.now.retain}

    def restarts(self, history: list[LossRow]) -> bool:
        """Whether the next step begins from the original weights."""
        decision = self.decision(history)
        return decision.restart and decision.start == len(history)

    def looks(self, history: list[LossRow]) -> bool:
        """Whether it is time to measure what moved, or for a probe."""
        now = self.decision(history)
        return self._measures(history, now) or self._probes(history, now)

    def _measures(self, history: list[LossRow], now: Decision) -> bool:
        step = len(history)
        due = self.redraws and step // self.every % PAIR == 0 and not {f"{MOVED}0", STRENGTH} & history[-1].keys()
        return due and step == _unchanged_until(now, self.every, step - 1)

    def _probes(self, history: list[LossRow], now: Decision) -> bool:
        return len(history) == now.start + now.length and STRENGTH not in history[-1]

    def failed(self, history: list[LossRow]) -> bool:
        """Take a step that failed for a probe that finds the model wrecked; False where no weights are left to take."""
        failure = Probed.of_failure(len(history), self.concepts)
        ahead = [*history[:-1], history[-1] | failure.as_row()]
        if self.decision(ahead).phase is Phase.GIVE_UP:
            best = self.best(ahead) if self.write is not None else None
            if best is None:
                return False
            ahead[-1] |= self._earlier(self._least_harmful(looks_of(ahead[best.step - 1]), best))
        history[-1] = ahead[-1]
        return True

    def _earlier(self, probe: Probed) -> LossRow:
        """What the last row says where weights of an earlier step are kept, as the probe found them."""
        return {KEPT: probe.strength, EARLIER: float(probe.step)}

    def after(self, history: list[LossRow]) -> None:
        """Add to the last row of the history, where it is time for that, what moved, and a probe."""
        step, now = len(history), self.decision(history)
        if self._measures(history, now):
            history[-1] |= {f"{MOVED}{i}": each for i, each in enumerate(self.probe.moved(harmed=now.harmed))}
        if self._probes(history, now):
            settled = now.phase is Phase.SETTLE
            often = len(probes_of(history)) % PAIR == PAIR - 1
            looks = [self.probe(step, thorough=settled, drift=settled or often, grown=now.grown)]
            if settled:
                looks += self._unharmed(looks[0])
            decides = looks[-1] if looks[-1].reaches(self.goal) else looks[0]
            row = history[-1] | decides.as_row()
            ahead = [*history[:-1], row]
            phase, best = self.decision(ahead).phase, self.best(ahead)
            last = self._least_harmful(looks, decides)
            earlier = self._least_harmful(looks_of(ahead[best.step - 1]), best) if best is not None else None
            if phase is Phase.GIVE_UP and earlier is not None and self._better(earlier, last):
                row |= self._earlier(earlier)
            elif phase in (Phase.REACHED, Phase.GIVE_UP):
                row[KEPT], more = self._kept(last)
                looks += more
            tried = [look for look in looks if look is not decides]
            for i, look in enumerate(tried):
                row |= look.as_row(f"{TRIED}{i} ")
            history[-1] |= row  # all at once: a look that was interrupted is repeated

    def _least_harmful(self, looks: list[Probed], decides: Probed) -> Probed:
        """Of looks at several strengths after one step, the one with the concept gone at the least harm.

        The one that decides where that reaches the goal, or the concept is gone at none.
        """
        gone = [each for each in looks if each.drift is not None and each.erased(self.goal)]
        if decides.reaches(self.goal) or not gone:
            return decides
        return min(gone, key=lambda each: each.harm(self.goal))

    def _better(self, earlier: Probed, last: Probed) -> bool:
        """Whether earlier weights are nearer to the goal than the last ones, even at a strength of less harm."""
        if self.write is None or earlier.step == last.step:
            return False
        if last.wrecked or not last.erased(self.goal):
            return last.wrecked or earlier.nearness(self.goal) > last.nearness(self.goal)
        return earlier.erased(self.goal) and earlier.harm(self.goal) < LESS * last.harm(self.goal)

    def _unharmed(self, last: Probed) -> list[Probed]:
        """Looks at smaller strengths where images are harmed at this one: the last reaches the goal, or none does.

        Each strength follows from the harm at the one before it. Once the concept is back at one that harms as little
        as allowed, it lies in the middle between that and the least at which the concept was gone.
        """
        now, power, back, gone = last, HARM_POWER, 0.0, last.strength
        looks: list[Probed] = []
        while last.erased(self.goal) and not now.reaches(self.goal) and not last.wrecked and len(looks) < LOOKS:
            erased, harm = now.erased(self.goal), now.harm(self.goal)
            back, gone = (back, now.strength) if erased else (now.strength, gone)
            if not erased and harm > 1:
                break  # a smaller change harms less, and a larger one erases more
            strength = math.floor(100 * now.strength * (SAFE / harm) ** (1 / power)) / 100 if erased else 0.0
            if back:
                strength = round((back + gone) / 2, 2)
            if strength < LOWEST or not back < strength < gone:
                break
            now = self._at(strength, last.step, harm=True)
            looks.append(now)
            if harm := now.harm(self.goal):
                power = min(max(math.log(harm / last.harm(self.goal)) / math.log(now.strength), 0.5), 3.0)
        return looks

    def _at(self, strength: float, step: int, harm: bool) -> Probed:
        """A look at the weights of a smaller strength."""
        with self.at_strength(strength):
            return self.probe.again(step, strength, harm=harm)

    def _kept(self, last: Probed) -> tuple[float, list[Probed]]:
        """The strength of the weights that are kept at the end of the training, and the looks that chose it.

        Where the concept is gone, it is the smallest at which it stays so, with a step of margin, if a last look finds
        that this reaches the goal where the larger one does; a goal for attacks keeps the whole change, as a smaller
        one withstands less. Of a wrecked model it is one that is not.
        """
        strength = last.strength
        looks: list[Probed] = []
        if last.wrecked:
            for strength in WEAKER:
                looks.append(self._at(strength, last.step, harm=True))
                if looks[-1].harm(self.goal) <= 1:
                    break
        elif last.erased(self.goal) and self.goal.asr is None:
            smaller = [each for each in STRENGTHS if each < last.strength]
            for larger, tried in pairwise(smaller):  # the margin, so that the first needs no look of its own
                looks.append(self._at(tried, last.step, harm=False))
                if not looks[-1].erased(self.goal):
                    break
                strength = larger
            if strength < last.strength:
                looks.append(self._at(strength, last.step, harm=True))
                if last.reaches(self.goal) and not looks[-1].reaches(self.goal):
                    strength = last.strength
        return strength, looks

    def unchanged_until(self, step: int) -> int:
        """The step up to which nothing that the batches depend on changes, from this one on."""
        return _unchanged_until(self.now, self.every, step)

    def stops(self, history: list[LossRow]) -> bool:
        """Whether to stop here."""
        return self.decision(history).phase in (Phase.REACHED, Phase.GIVE_UP)

    def expected(self, history: list[LossRow]) -> int:
        """The step of the end, if all goes well from here."""
        now = self.decision(history)
        settle = 0 if now.phase is not Phase.CONTINUE else max(SETTLING * self.every, now.start // 2)
        return min(max(now.start + now.length + settle, len(history)), self.budget)

    @property
    def frequencies(self) -> list[float] | None:
        """How often each concept's samples are drawn, relative to each other; None for equally often."""
        unfinished, probed = self.now.unfinished, self.now.start > 0
        if not probed or not unfinished:
            return None
        return [1.0 if i in unfinished else RARER for i in range(self.concepts)]

    def reached(self, history: list[LossRow]) -> bool:
        """Whether the weights that are kept reach the goal."""
        return self.chosen(history).reaches(self.goal)

    def chosen(self, history: list[LossRow]) -> Probed:
        """The last look at the weights that are kept."""
        step, strength = kept_step(history), kept_strength(history)
        row = history[step - 1]
        looks = [look for look in looks_of(row) if look.strength == strength]
        return looks[-1]

    def summary(self, history: list[LossRow]) -> str:
        """What came of it, in a sentence."""
        step, came = kept_step(history), "reached" if self.reached(history) else "not reached"
        text = f"the goal {self.goal} was {came} after {len(history)} of at most {self.budget} steps"
        earlier = f", of which those after step {step} came nearest to it" if step < len(history) else ""
        if lost := int(history[-1].get(LOST, 0)):
            earlier = f" (the weights after step {lost} came nearer to it, but could not be read again)"
        return f"{text}{earlier}: {self.chosen(history)}"

    def as_json(self, history: list[LossRow]) -> dict[str, Any]:
        """As in `run.json`."""
        probes = []
        failures = [int(row["step"]) for row in history if (p := Probed.of_row(row)) is not None and p.failure]
        for row in (row for row in history if row["step"] not in failures):
            decides = [look.as_json() | {"decides": True} for look in probes_of([row])]
            probes += decides + [look.as_json() | {"decides": False} for look in tried_of(row)]
        used = self.decision(history[: kept_step(history) - 1])  # by which the weights that are kept were trained
        return {
            "goal": str(self.goal),
            "reached": self.reached(history),
            "steps": len(history),
            "budget": self.budget,
            "every": self.every,
            "strength": kept_strength(history),
            "step": kept_step(history),
            "lr": self.lr,
            "lr_factor": used.factor,
            "target_guidance": used.guidance,
            "retain_factor": used.retain if "retain" in history[-1] else 1.0,
            "probes": probes,
            "failed_steps": failures,
        }


def _unchanged_until(now: Decision, every: int, step: int) -> int:
    return now.start + min(now.length, (step - now.start) // every * every + every)


def probes_of(history: list[LossRow]) -> list[Probed]:
    """The probes that a training's history holds, and that its decisions follow from."""
    return [probe for row in history if (probe := Probed.of_row(row)) is not None]


def tried_of(row: LossRow) -> list[Probed]:
    """The looks at other strengths in a row of the history."""
    looks: list[Probed] = []
    while (look := Probed.of_row(row, f"{TRIED}{len(looks)} ")) is not None:
        looks.append(look)
    return looks


def looks_of(row: LossRow) -> list[Probed]:
    """All looks in a row of the history, the one that decides first."""
    return [*probes_of([row]), *tried_of(row)]


def kept_strength(history: list[LossRow]) -> float:
    """s of θ₀ + s·(θ − θ₀), the weights that are kept at the end of a training."""
    return history[-1][KEPT]


def kept_step(history: list[LossRow]) -> int:
    """The step after which the network had the weights that are kept, at that strength."""
    return int(history[-1].get(EARLIER, len(history)))


def without_earlier(row: LossRow) -> LossRow:
    """The last row of a history where the weights of that step are lost: the last ones are kept, whole."""
    return {name: value for name, value in row.items() if name != EARLIER} | {KEPT: 1.0, LOST: row[EARLIER]}


def _frequencies(history: list[LossRow]) -> list[float] | None:
    """Of the retain samples, by how far they moved when that was measured last."""
    row = next((row for row in reversed(history) if f"{MOVED}0" in row), {})
    return [BASE + min(value**2, OFTEN) for name, value in row.items() if name.startswith(MOVED)] or None


def losses_of(history: list[LossRow]) -> list[LossRow]:
    """The history without its probes."""
    return [{name: value for name, value in row.items() if not name.startswith(PREFIX)} for row in history]
