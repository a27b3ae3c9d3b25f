"""Training until a goal is reached: probes on the way, a rate that follows them, the smallest change at last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from salun.diffusion.goal import PAIR, PREFIX, SETTLING, Decision, Goal, Phase, Probed, decide
from salun.masking.training_state import LossRow

STRENGTHS = (0.85, 0.7, 0.55)  # of a smaller change
DRIFT_POWER = 1.5  # drift grows about as s^1.5 with the strength s: 0.79 at 0.85, 0.59 at 0.7 on the bundled model
WEAKER = (0.5, 0.25, 0.1)  # tried where the model is wrecked
BASE, OFTEN = 0.2, 50.0  # how often a retain sample is drawn: at least, and at most by how far it moved, squared
MOVED = f"{PREFIX}moved "
RARER = 0.25  # how often a concept that is gone is drawn, relative to one that shows


class Probe(Protocol):
    """Looks at the live network's weights."""

    def __call__(self, step: int, strength: float = 1.0, *, thorough: bool, drift: bool) -> Probed:
        """Which are those of a strength after a step. thorough: for a decision at last. drift: measure it too."""

    def moved(self) -> list[float]:
        """How far the prediction of each retain sample moved, relative to their mean."""


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
        ends: The probes at the end, of several strengths.
        strength: s of θ₀ + s·(θ − θ₀), the weights that are kept.
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
    ends: list[Probed] = field(default_factory=list)
    strength: float = 1.0
    now: Decision = field(init=False)
    retain_frequencies: list[float] | None = None

    def __post_init__(self) -> None:
        self.now = self.decision([])

    def decision(self, history: list[LossRow]) -> Decision:
        """What follows from the probes in a history."""
        return decide(self.goal, probes_of(history), self.every, self.budget)

    def before(self, history: list[LossRow]) -> float:
        """Take note of what was decided; the learning rate of the next step."""
        assert self.lr is not None
        self.now = self.decision(history)
        self.retain_frequencies = _frequencies(history)
        taken = len(history) - self.now.start
        falling = 1 - taken / self.now.length if self.now.phase is Phase.SETTLE else 1.0
        return self.lr * self.now.factor * falling

    def restarts(self, history: list[LossRow]) -> bool:
        """Whether the next step begins from the original weights."""
        decision = self.decision(history)
        return decision.restart and decision.start == len(history)

    def after(self, history: list[LossRow]) -> None:
        """Add to the last row of the history, where it is time for that, what moved, and a probe."""
        step, now = len(history), self.decision(history)
        due = step // self.every % PAIR == 0 and f"{MOVED}0" not in history[-1]
        if due and step == _unchanged_until(now, self.every, step - 1):
            history[-1] |= {f"{MOVED}{i}": each for i, each in enumerate(self.probe.moved())}
        if step == now.start + now.length:
            settled = now.phase is Phase.SETTLE
            often = len(probes_of(history)) % PAIR == PAIR - 1
            probed = self.probe(step, thorough=settled, drift=settled or often)
            if settled and probed.erased(self.goal):
                probed = self._within_drift(probed)
            history[-1] |= probed.as_row()

    def _within_drift(self, last: Probed) -> Probed:
        """The probe, or that of the largest strength that reaches the goal where drift is too far at this one."""
        assert last.drift is not None
        weaker, limit = last, self.goal.retain_drift
        for strength in (each for each in STRENGTHS if last.drift * each**DRIFT_POWER <= limit):
            if weaker.reaches(self.goal) or not weaker.erased(self.goal):
                break
            weaker = self._at(strength, last.step, drift=True)
        return weaker if weaker.reaches(self.goal) else last

    def _at(self, strength: float, step: int, drift: bool) -> Probed:
        """A close look at the weights of a strength."""
        with self.at_strength(strength):
            return self.probe(step, strength, thorough=True, drift=drift)

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

    def choose_strength(self, history: list[LossRow]) -> float:
        """The smallest change that reaches the goal, with a step of margin; of a wrecked model one that is not.

        A goal for attacks keeps the whole change.
        """
        last = probes_of(history)[-1]
        step, self.ends, self.strength = len(history), [last], last.strength
        if last.reaches(self.goal) and self.goal.asr is None:  # a smaller change withstands less
            smaller = [each for each in STRENGTHS if each < last.strength]
            for next_smaller, tried in pairwise(
                smaller
            ):  # one step of margin, so that the first needs no look of its own
                self.ends.append(self._at(tried, step, drift=False))
                if not self.ends[-1].erased(self.goal):
                    break
                self.strength = next_smaller
        elif last.wrecked:
            for self.strength in WEAKER:
                self.ends.append(self._at(self.strength, step, drift=True))
                if (self.ends[-1].drift or 0.0) <= self.goal.retain_drift:
                    break
        return self.strength

    @property
    def reached(self) -> bool:
        """Whether the weights that are kept reach the goal."""
        return self.ends[0].reaches(self.goal)

    def summary(self, history: list[LossRow]) -> str:
        """What came of it, in a sentence."""
        chosen = next((probe for probe in self.ends if probe.strength == self.strength), None)
        came = "reached" if self.reached else "not reached"
        text = f"the goal {self.goal} was {came} after {len(history)} of at most {self.budget} steps"
        if chosen is not None:
            return f"{text}: {chosen}"
        return f"{text}: {self.ends[0]}; {100 * self.strength:.0f} % of the change are kept, as a smaller one suffices"

    def as_json(self, history: list[LossRow]) -> dict[str, Any]:
        """As in `run.json`."""
        return {
            "goal": str(self.goal),
            "reached": self.reached,
            "steps": len(history),
            "budget": self.budget,
            "every": self.every,
            "strength": self.strength,
            "lr": self.lr,
            "lr_factor": self.decision(history).factor,
            "target_guidance": self.decision(history).guidance,
            "probes": [probe.as_json() for probe in (*probes_of(history), *self.ends[1:])],
        }


def _unchanged_until(now: Decision, every: int, step: int) -> int:
    return now.start + min(now.length, (step - now.start) // every * every + every)


def probes_of(history: list[LossRow]) -> list[Probed]:
    """The probes that a training's history holds."""
    return [probe for row in history if (probe := Probed.of_row(row)) is not None]


def _frequencies(history: list[LossRow]) -> list[float] | None:
    """Of the retain samples, by how far they moved when that was measured last."""
    row = next((row for row in reversed(history) if f"{MOVED}0" in row), {})
    return [BASE + min(value**2, OFTEN) for name, value in row.items() if name.startswith(MOVED)] or None


def losses_of(history: list[LossRow]) -> list[LossRow]:
    """The history without its probes."""
    return [{name: value for name, value in row.items() if not name.startswith(PREFIX)} for row in history]
