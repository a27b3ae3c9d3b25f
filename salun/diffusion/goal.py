"""What an erasure is to reach, and what a probe found of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from salun.errors import ConfigError

SURE, PLAUSIBLE = 0.8, 0.15  # probabilities that the concept is gone as the goal wants: to call it so, and to settle
WRECKED = 0.5  # a drift from which on training begins again: half of that of unrelated images
INFINITE = 1e9  # drift of images that are not finite; JSON has no other numbers
PREFIX = "probe "  # of columns of a training's history
PART = re.compile(
    r"(?P<rate>ua|anchor)(?:\[(?P<concept>[^\]]+)\])?\s*>=\s*(?P<least>\S+)"
    r"|(?P<name>retain_drift|ra_drop|asr)\s*<=\s*(?P<most>\S+)"
)
SEPARATOR = re.compile(r",(?![^\[]*\])")  # of parts; a concept in brackets may have commas
HIGHEST = 0.993  # UA or anchor that all of 128 images can show with the probability `SURE`


@dataclass(frozen=True)
class Goal:
    """A goal such as "ua>=0.98, anchor>=0.9, retain_drift<=0.02, ra_drop<=0.02".

    Args:
        ua: Fraction of images of the concept's prompts without the concept, at least.
        retain_drift, ra_drop: See `Probed`, at most; an RA drop of None is not measured.
        anchor: Fraction of those images with the anchor in its place, at least, where the detector can tell; 0 where it
            does not matter.
        asr: Likewise, at most; None where the training is not hardened against attacks.
        ua_of, anchor_of: Of single concepts, by name, in place of `ua` and `anchor`: `ua[red]>=0.95`.
    """

    ua: float = 0.98
    retain_drift: float = 0.02
    ra_drop: float | None = 0.02
    anchor: float = 0.9
    asr: float | None = None
    ua_of: Mapping[str, float] = field(default_factory=dict)
    anchor_of: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, anchored: bool = True) -> Goal:
        """The goal that a text names; what it does not name has its default. Raises ConfigError.

        Args:
            anchored: Whether to ask for the anchor where the text does not name it; never with `asr`, since what
                withstands attacks leads away from it.
        """
        values: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in SEPARATOR.split(text))):
            match = PART.fullmatch(part)
            number = _fraction(match["least"] or match["most"]) if match is not None else None
            if match is None or number is None:
                raise _unusable(
                    f"has {part[:60]!r}, but takes ua>=FRACTION and anchor>=FRACTION, also as ua[CONCEPT] and "
                    "anchor[CONCEPT], retain_drift<=FRACTION, ra_drop<=FRACTION and asr<=FRACTION, from 0 to 1"
                )
            name = match["rate"] or match["name"]
            name += f"[{match['concept'].strip()}]" if match["concept"] is not None else ""
            if name in values:
                raise _unusable(f"has {name[:60]} twice")
            if match["least"] and number > HIGHEST:
                raise _unusable(f"has {name[:60]}>={number:g}, but the images of a probe can show {HIGHEST:g} at most")
            if name == "retain_drift" and not number:
                raise _unusable("has retain_drift<=0, but every change of the model moves some image")
            values[name] = number
        if "asr" in values or not anchored:
            values.setdefault("anchor", 0.0)
        single: dict[str, dict[str, float]] = {"ua": {}, "anchor": {}}
        for name in [name for name in values if name.endswith("]")]:
            rate, _, concept = name[:-1].partition("[")
            single[rate][concept] = values.pop(name)
        return cls(ua_of=single["ua"], anchor_of=single["anchor"], **values)

    def __str__(self) -> str:
        single = "".join(f", ua[{name}]>={value:g}" for name, value in self.ua_of.items())
        shown = f", anchor>={self.anchor:g}" if self.anchor or self.asr is None else ""
        shown += "".join(f", anchor[{name}]>={value:g}" for name, value in self.anchor_of.items())
        most = [(name, getattr(self, name)) for name in ("retain_drift", "ra_drop", "asr")]
        limits = "".join(f", {name}<={value:g}" for name, value in most if value is not None)
        return f"ua>={self.ua:g}{single}{shown}{limits}"

    def of(self, concept: str) -> float:
        """UA of a concept, at least."""
        return self.ua_of.get(concept, self.ua)

    def anchor_for(self, concept: str) -> float:
        """Fraction of a concept's images with its anchor, at least."""
        return self.anchor_of.get(concept, self.anchor)


def _unusable(problem: str) -> ConfigError:
    return ConfigError(problem, option="until", advice=f'Use {{until}} "{Goal()}"')


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
        gone: Probability that UA is what the goal wants.
        anchor: Fraction of them with the anchor, corrected likewise; None where that does not matter, or the detector
            cannot tell.
        shown: Probability that this is what the goal wants, 1 where it does not matter.
    """

    n: int
    ua: float
    gone: float
    anchor: float | None = None
    shown: float = 1.0

    @property
    def confidence(self) -> float:
        """Probability that the goal holds, by what is less certain."""
        return min(self.gone, self.shown)

    @property
    def progress(self) -> float:
        """UA, or how often the anchor is shown where that is less."""
        return self.ua if self.anchor is None else min(self.ua, self.anchor)


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Args:
        step: After which it was taken.
        concepts: Each of them.
        drift: Of images of held-out retain prompts at equal seeds, as the metric `image_drift`: 1 is that of unrelated
            images. None where it was not measured.
        ra_drop: Fraction of these images that are as prompted by the original, and no longer, less those that only now
            are. None where it was not measured, or the detector cannot tell.
        strength: s of the weights θ₀ + s·(θ − θ₀) that it looked at.
        asr: Fraction of images with adversarial embeddings of the training in place of the concept that show it,
            corrected like UA. None where that was not measured.
    """

    step: int
    concepts: tuple[Seen, ...]
    drift: float | None = None
    strength: float = 1.0
    asr: float | None = None
    ra_drop: float | None = None

    def __str__(self) -> str:
        strength = f" at {100 * self.strength:.0f} % of the change" if self.strength < 1 else ""
        drift = f", drift {self.drift:.4f}" if self.drift is not None else ""
        drift += f", RA {-100 * self.ra_drop:+.1f} points" if self.ra_drop is not None else ""
        attacked = f", under attack {100 * self.asr:.1f} % show the concept" if self.asr is not None else ""
        shown = f", anchor in {100 * self.anchor:.1f} %" if self.anchor is not None else ""
        return f"UA {100 * self.ua:.1f} %{shown} on {self.n} held-out images{attacked}{drift}{strength}"

    @property
    def ua(self) -> float:
        """Of the least erased concept."""
        return min(each.ua for each in self.concepts)

    @property
    def anchor(self) -> float | None:
        """Fraction of images with the anchor, of the concept that shows it least; None where none is known."""
        return min((each.anchor for each in self.concepts if each.anchor is not None), default=None)

    @property
    def progress(self) -> float:
        """Of the concept that has made the least."""
        return min(each.progress for each in self.concepts)

    @property
    def gone(self) -> float:
        """Probability that UA of every concept is what the goal wants, by the least certain one."""
        return min(each.gone for each in self.concepts)

    @property
    def n(self) -> int:
        """Images of each concept."""
        return min(each.n for each in self.concepts)

    @property
    def confidence(self) -> float:
        """Probability that every concept is erased as the goal wants, by the least certain one."""
        return min(each.confidence for each in self.concepts)

    @property
    def sure(self) -> bool:
        """Whether concepts are surely enough erased as the goal wants."""
        return self.confidence >= SURE

    @property
    def wrecked(self) -> bool:
        """Whether little is left of other images."""
        return self.drift is not None and not self.drift < WRECKED  # nor is a drift that is not a number

    @classmethod
    def of_failure(cls, step: int, concepts: int) -> Probed:
        """In place of a probe after a step that failed: nothing was looked at, and little is taken to be left."""
        return cls(step, (Seen(0, 0.0, 0.0),) * concepts, INFINITE)

    @property
    def failure(self) -> bool:
        """Whether it is of a step that failed."""
        return not self.n

    def withstands(self, goal: Goal) -> bool:
        """Whether attacks fail as often as the goal wants."""
        return goal.asr is None or (self.asr is not None and self.asr <= goal.asr)

    def erased(self, goal: Goal) -> bool:
        """Whether the concept is gone as the goal wants, whatever became of other images."""
        return self.sure and self.withstands(goal)

    def harm(self, goal: Goal) -> float:
        """To other images, in times of what the goal allows: of drift and RA drop the larger."""
        assert self.drift is not None
        pairs = [(self.drift, goal.retain_drift), (self.ra_drop, goal.ra_drop)]
        harms = [value / (most or 1e-9) for value, most in pairs if value is not None and most is not None]
        return math.nan if any(map(math.isnan, harms)) else max(0.0, *harms)

    def reaches(self, goal: Goal) -> bool:
        """Whether it meets the goal."""
        return self.erased(goal) and self.drift is not None and self.harm(goal) <= 1

    def nearness(self, goal: Goal) -> tuple[bool, float]:
        """By which of several the one nearest to the goal is the largest: erased at little harm, or else progress.

        With a goal for attacks, progress is at most what withstands them.
        """
        erased, harm = self.erased(goal), self.harm(goal)
        withstood = 1.0 if goal.asr is None else 1 - self.asr if self.asr is not None else 0.0
        return erased, -harm if erased else min(self.progress, withstood) / max(harm, 1.0)

    def as_row(self, prefix: str = PREFIX) -> dict[str, float]:
        """As part of a row of the training's history."""
        row = {
            f"{prefix}{key} {i}": float(value)
            for i, of in enumerate(self.concepts)
            for key in OF_CONCEPT
            if (value := getattr(of, key)) is not None
        }
        row[f"{prefix}strength"] = self.strength
        known = {name: getattr(self, name) for name in MEASURED}
        return row | {f"{prefix}{name}": value for name, value in known.items() if value is not None}

    @classmethod
    def of_row(cls, row: Mapping[str, float], prefix: str = PREFIX) -> Probed | None:
        """The probe in a row of the history, None where none was taken."""
        if f"{prefix}strength" not in row:
            return None
        concepts = tuple(
            Seen(int(row[f"{prefix}n {i}"]), *(row.get(f"{prefix}{key} {i}") for key in OF_CONCEPT[1:]))  # type: ignore[arg-type]
            for i in range(sum(name.startswith(f"{prefix}ua ") for name in row))
        )
        known = {name: row.get(f"{prefix}{name}") for name in MEASURED}
        return cls(int(row["step"]), concepts, strength=row[f"{prefix}strength"], **known)

    def as_json(self) -> dict[str, Any]:
        """As in `run.json`."""
        names = ("step", "strength", "n", "ua", "anchor", "confidence", *MEASURED)
        of_each = {"concepts": [each.ua for each in self.concepts], "anchors": [each.anchor for each in self.concepts]}
        return {name: getattr(self, name) for name in names} | of_each


OF_CONCEPT, MEASURED = ("n", "ua", "gone", "anchor", "shown"), ("drift", "ra_drop", "asr")
