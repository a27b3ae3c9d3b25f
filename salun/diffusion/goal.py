"""What an erasure is to reach, and what is decided from the probes of a training so far.

Decisions depend on the recorded probes alone, so that a resumed training takes the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from salun.errors import ConfigError

SURE, PLAUSIBLE = 0.8, 0.15  # probabilities that UA is what the goal wants: to call it reached, and to settle
WRECKED = 0.5  # a drift from which on training begins again: half of that of unrelated images
FASTER, MOST = 3.0, 27.0  # by which the rate rises while UA does not move, and at most in all
SLOWER, BACK = 0.5, 0.25  # by which it falls where other images drift too far, and where the model is wrecked
GUIDED, FARTHEST = 0.25, 0.75  # by which the target's guidance η rises where the anchor is not enough; at most in all
HARDEST, UNSETTLED = 1.5, 2.0  # at most, where attacks succeed; drift at a constant rate, in times of that at the end
PAIR, STUCK, MOVED = 2, 4, 0.05  # probes that are compared; those without progress; what progress is, a fraction
UNMOVED = 0.1  # UA up to which the rate is too low, rather than the anchor not enough
SETTLING = 3  # probe intervals, at least, over which the rate falls to 0
TRIES, RESTARTS = 2, 3  # at lower rates against drift, and from the original weights
PREFIX = "probe "  # of columns of a training's history
PART = re.compile(
    r"ua(?:\[(?P<concept>[^\]]+)\])?\s*>=\s*(?P<least>\S+)|(?P<name>retain_drift|asr)\s*<=\s*(?P<most>\S+)"
)
BETTER = 0.9  # a try against drift that does not bring it below this times the last one is the last


@dataclass(frozen=True)
class Goal:
    """A goal such as "ua>=0.98, retain_drift<=0.02".

    Args:
        ua: Fraction of images of the concept's prompts without the concept, at least.
        retain_drift: See `Probed`, at most.
        asr: Likewise, at most; None where the training is not hardened against attacks.
        ua_of: Of single concepts, by name, in place of `ua`: `ua[red]>=0.95`.
    """

    ua: float = 0.98
    retain_drift: float = 0.02
    asr: float | None = None
    ua_of: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Goal:
        """The goal that a text names; what it does not name has its default. Raises ConfigError."""
        values: dict[str, float] = {}
        ua_of: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = PART.fullmatch(part)
            number = _fraction(match["least"] or match["most"]) if match is not None else None
            if match is None or number is None:
                raise ConfigError(
                    f"has {part[:60]!r}, but takes ua>=FRACTION, ua[CONCEPT]>=FRACTION, retain_drift<=FRACTION and "
                    "asr<=FRACTION, from 0 to 1",
                    option="until",
                    advice=f'Use {{until}} "{cls()}"',
                )
            if match["concept"] is not None:
                ua_of[match["concept"].strip()] = number
            else:
                values["ua" if match["least"] else match["name"]] = number
        return cls(**values, ua_of=ua_of)

    def __str__(self) -> str:
        single = "".join(f", ua[{name}]>={value:g}" for name, value in self.ua_of.items())
        attacked = f", asr<={self.asr:g}" if self.asr is not None else ""
        return f"ua>={self.ua:g}{single}, retain_drift<={self.retain_drift:g}{attacked}"

    def of(self, concept: str) -> float:
        """UA of a concept, at least."""
        return self.ua_of.get(concept, self.ua)


def _fraction(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


@dataclass(frozen=True)
class Seen:
    """A concept in the images of a probe.

    Args:
        n: Images of its held-out prompts.
        ua: Fraction of them without the concept, corrected by the detector's calibration.
        confidence: Probability that UA is what the goal wants.
    """

    n: int
    ua: float
    confidence: float


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Args:
        step: After which it was taken.
        concepts: Each of them.
        drift: Of images of held-out retain prompts at equal seeds, as the metric `image_drift`: 1 is that of unrelated
            images. None where it was not measured.
        strength: s of the weights θ₀ + s·(θ − θ₀) that it looked at.
        asr: Fraction of images with adversarial embeddings of the training in place of the concept that show it,
            corrected like UA. None where that was not measured.
    """

    step: int
    concepts: tuple[Seen, ...]
    drift: float | None = None
    strength: float = 1.0
    asr: float | None = None

    def __str__(self) -> str:
        strength = f" at {100 * self.strength:.0f} % of the change" if self.strength < 1 else ""
        drift = f", drift {self.drift:.4f}" if self.drift is not None else ""
        attacked = f", under attack {100 * self.asr:.1f} % show the concept" if self.asr is not None else ""
        return f"UA {100 * self.ua:.1f} % on {self.n} held-out images{attacked}{drift}{strength}"

    @property
    def ua(self) -> float:
        """Of the least erased concept."""
        return min(each.ua for each in self.concepts)

    @property
    def n(self) -> int:
        """Images of each concept."""
        return min(each.n for each in self.concepts)

    @property
    def confidence(self) -> float:
        """Probability that UA of every concept is what the goal wants, by the least certain one."""
        return min(each.confidence for each in self.concepts)

    @property
    def sure(self) -> bool:
        """Whether UA is surely enough what the goal wants."""
        return self.confidence >= SURE

    @property
    def wrecked(self) -> bool:
        """Whether little is left of other images."""
        return self.drift is not None and not self.drift < WRECKED  # nor is a drift that is not a number

    def withstands(self, goal: Goal) -> bool:
        """Whether attacks fail as often as the goal wants."""
        return goal.asr is None or (self.asr is not None and self.asr <= goal.asr)

    def erased(self, goal: Goal) -> bool:
        """Whether the concept is gone as the goal wants, whatever became of other images."""
        return self.sure and self.withstands(goal)

    def reaches(self, goal: Goal) -> bool:
        """Whether it meets the goal."""
        return self.erased(goal) and self.drift is not None and self.drift <= goal.retain_drift

    def as_row(self, prefix: str = PREFIX) -> dict[str, float]:
        """As part of a row of the training's history."""
        row = {f"{prefix}{key} {i}": float(getattr(c, key)) for i, c in enumerate(self.concepts) for key in OF_CONCEPT}
        row[f"{prefix}strength"] = self.strength
        known = {"drift": self.drift, "asr": self.asr}
        return row | {f"{prefix}{name}": value for name, value in known.items() if value is not None}

    @classmethod
    def of_row(cls, row: Mapping[str, float], prefix: str = PREFIX) -> Probed | None:
        """The probe in a row of the history, None where none was taken."""
        if f"{prefix}strength" not in row:
            return None
        concepts = tuple(
            Seen(int(row[f"{prefix}n {i}"]), row[f"{prefix}ua {i}"], row[f"{prefix}confidence {i}"])
            for i in range(sum(name.startswith(f"{prefix}ua ") for name in row))
        )
        drift, asr = (row.get(f"{prefix}{name}") for name in ("drift", "asr"))
        return cls(int(row["step"]), concepts, drift, row[f"{prefix}strength"], asr)

    def as_json(self) -> dict[str, Any]:
        """As in `run.json`."""
        names = ("step", "strength", "n", "ua", "confidence", "drift", "asr")
        return {name: getattr(self, name) for name in names} | {"concepts": [each.ua for each in self.concepts]}


OF_CONCEPT = ("n", "ua", "confidence")


class Phase(str, Enum):
    """What a training towards a goal does next."""

    CONTINUE = "continue"
    SETTLE = "settle"  # take the noise of the steps out of the weights: let the learning rate fall to 0
    REACHED = "reached"
    GIVE_UP = "give up"

    __str__ = str.__str__


@dataclass(frozen=True)
class Decision:
    """What follows from the probes so far.

    Args:
        start: The step after which it was taken.
        length: Steps to the next probe.
        factor: Of the learning rate.
        guidance: η of the forget target, beyond that of the options (see `frozen_predictions`).
        restart: Whether to begin again from the original weights.
        unfinished: Concepts that still show, by number; empty before the first probe.
    """

    phase: Phase
    start: int
    length: int
    factor: float = 1.0
    guidance: float = 0.0
    restart: bool = False
    unfinished: tuple[int, ...] = ()

    @property
    def grown(self) -> bool:
        """Whether few forget latents do not suffice: UA stands still, or was lost."""
        return self.guidance > 0


def decide(goal: Goal, probes: Sequence[Probed], every: int, budget: int) -> Decision:
    """What to do after these probes of a training.

    Train at a constant rate, with a probe every so many steps, until UA is plausible. Then let the rate fall to 0, over
    half as many steps again, and look closely: if the goal holds, it is reached; if UA was lost, train on, towards a
    target further from the concept; if other images drift too far, and no smaller change helps, train on at half the
    rate, falling again. While UA stands still, the rate rises, or, where the concept is gone from some images, the
    target moves; and so it does while attacks succeed and other images stay. A wrecked model begins again from the
    original weights, at a quarter of the rate.

    Args:
        every: Steps between probes.
        budget: Steps at most.
    """
    *_, last = _decisions(goal, probes, every, budget)
    return last


def _decisions(goal: Goal, probes: Sequence[Probed], every: int, budget: int) -> Iterator[Decision]:
    """The first decision, and the one after each probe."""
    now = Decision(Phase.CONTINUE, 0, min(every, budget))
    yield now
    constant, idle, tries, restarts = 0, -1, 0, 0  # constant: steps at a constant rate
    drift = float("inf")  # when last settled
    for i, probe in enumerate(probes):
        settled, factor, guidance, restart = now.phase is Phase.SETTLE, now.factor, now.guidance, False
        constant += 0 if settled else now.length
        end = probe.step >= budget
        if settled and probe.reaches(goal):
            phase = Phase.REACHED
        elif probe.wrecked and restarts < RESTARTS and not end:
            phase, factor, restart = Phase.CONTINUE, factor * BACK, True
            restarts, constant, idle = restarts + 1, 0, i
        elif end or probe.wrecked:
            phase = Phase.GIVE_UP
        elif _attacked(goal, probe, now.guidance, settled) and probe.confidence >= (SURE if settled else PLAUSIBLE):
            phase, guidance, idle = Phase.CONTINUE, min(guidance + GUIDED, HARDEST), i
        elif settled and probe.sure:
            assert probe.drift is not None
            phase = Phase.SETTLE if tries < TRIES and probe.drift < BETTER * drift else Phase.GIVE_UP
            tries, drift, factor = tries + 1, probe.drift, factor * SLOWER
        elif settled:
            phase, idle = Phase.CONTINUE, i
            guidance = guidance if probe.confidence >= PLAUSIBLE else min(guidance + GUIDED, FARTHEST)
        else:
            phase = Phase.SETTLE if probe.confidence >= PLAUSIBLE else Phase.CONTINUE
            if phase is Phase.CONTINUE and _stands_still(probes[idle + 1 : i + 1]):
                if probe.ua <= UNMOVED:
                    factor = min(factor * FASTER, MOST)
                else:
                    guidance = min(guidance + GUIDED, FARTHEST)
                idle = i
        length = max(SETTLING * every, constant // 2)
        if phase is Phase.CONTINUE and probe.step + every + length > budget and not restart:
            phase = Phase.SETTLE  # the last steps are always those that settle
        length = min(length if phase is Phase.SETTLE else every, budget - probe.step)
        unfinished = tuple(k for k, each in enumerate(probe.concepts) if each.confidence < PLAUSIBLE)
        now = Decision(phase, probe.step, length, factor, guidance, restart, unfinished)
        yield now


def _attacked(goal: Goal, probe: Probed, guidance: float, settled: bool) -> bool:
    """Whether attacks succeed, and the target may yet move further from the concept."""
    retained = probe.drift is None or probe.drift <= goal.retain_drift * (1.0 if settled else UNSETTLED)
    return probe.asr is not None and not probe.withstands(goal) and retained and guidance < HARDEST


def _stands_still(since: Sequence[Probed]) -> bool:
    """Whether UA has not moved in the probes since the last change, and other images are there still."""
    if len(since) < PAIR or all(probe.drift is None for probe in since):
        return False
    recent = sum(probe.ua for probe in since[-PAIR:]) / PAIR
    earlier = sum(probe.ua for probe in since[-STUCK : -STUCK + PAIR]) / PAIR
    return recent <= UNMOVED or (len(since) >= STUCK and recent - earlier < MOVED)
