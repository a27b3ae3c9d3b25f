"""Did it work? One verdict on an erasure, the same at the command line, in reports, in the tab and in nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from math import hypot
from typing import Any

from salun.evaluation.estimate import Estimate, from_json
from salun.methods import METHODS

ERASED, MOSTLY = 95.0, 50.0  # percent of images without the concept
SURE = 80.0  # the interval of "erased" begins here or above
DAMAGE = 5.0  # percentage points of retain accuracy
DRIFT = 0.5  # image drift; 1 is that of unrelated images
UNMOVED = (0.9, 1.1)  # distance to the anchor of a network that hardly moved; 1 is the original's
FEWEST = 8  # images of a concept


class Outcome(str, Enum):
    """What a verdict says."""

    ERASED = "erased"
    MOSTLY = "mostly erased"
    BARELY = "barely changed"
    DAMAGED = "damaged"
    UNKNOWN = "can't tell"

    __str__ = str.__str__


STRICTER = "Use a stricter goal ({until}), or {target_guidance} 0.25"  # for a run that trained to one
LOOK = "Look at the images too: a detector does not see everything"
ENOUGH = 32  # images, which show a complete erasure to be one


@dataclass(frozen=True)
class Verdict:
    """What came of an erasure.

    Args:
        text: A sentence with the two numbers behind it: of the concept, and of other prompts.
        advice: The next step; options in braces, as in `SalunError`.
    """

    outcome: Outcome
    text: str
    advice: str

    def as_json(self) -> dict[str, str]:
        """As in `run.json`."""
        return {**asdict(self), "outcome": str(self.outcome)}


def verdict_on(metrics: Mapping[str, Any]) -> Verdict:
    """The verdict on measured metrics, as in `run.json`; of several concepts the least erased one decides.

    The advice is on the options of the method that the metrics name; one that is not known is taken for SalUn.
    """
    by = METHODS["diffusion"].get(str(metrics.get("method")), METHODS["diffusion"]["salun"])
    stronger = STRICTER if metrics.get("goal") else by.stronger
    name, forgotten, reason = _least_erased(metrics)
    gone = _gone(name, forgotten, reason)
    others, damaged = _others(metrics)
    moved = _known(metrics, "anchor_gap")
    if damaged:
        return _verdict(Outcome.DAMAGED, by.weaker, others, gone)
    if forgotten is not None and forgotten.n >= FEWEST:
        outcome = _outcome(forgotten)
        more = f"Use {{eval_images}} {max(ENOUGH, 2 * forgotten.n)} or more: so few images cannot show more"
        unsure = more if forgotten.value >= ERASED else stronger
        return _verdict(outcome, LOOK if outcome is Outcome.ERASED else unsure, gone, others)
    if moved is not None and UNMOVED[0] <= moved.value <= UNMOVED[1]:
        distance = max(100 * (1 - moved.value), 0)
        text = f"the network's predictions for {name} went {distance:.0f} % of the way to the anchor's"
        return _verdict(Outcome.BARELY, stronger, text, others)
    advice = "Look at the images" + (", and use {eval_images} 16 or more" if forgotten is not None else "")
    return _verdict(Outcome.UNKNOWN, advice, gone, others)


def _verdict(outcome: Outcome, advice: str, *clauses: str) -> Verdict:
    text = "; ".join(clause for clause in clauses if clause)
    return Verdict(outcome, text[0].upper() + text[1:], advice)


def _outcome(forgotten: Estimate) -> Outcome:
    sure = forgotten.low is not None and forgotten.low >= SURE
    if forgotten.value >= ERASED and sure:
        return Outcome.ERASED
    return Outcome.MOSTLY if forgotten.value >= MOSTLY else Outcome.BARELY


def _least_erased(metrics: Mapping[str, Any]) -> tuple[str, Estimate | None, str]:
    """The concept that decides, how much of it is gone, and why this is unknown where it is."""
    by_concept: Mapping[str, Any] = metrics.get("per_concept") or {"": metrics}
    least: tuple[str, Estimate | None, str] | None = None
    for name, values in by_concept.items():
        shown = f"“{name}”" if name else "the concept"
        key = "ua_corrected" if "ua_corrected" in values else "ua"
        forgotten = _known(values, key)
        if forgotten is None:
            reason = (values.get("reasons") or {}).get(key) or metrics.get("reason") or "it was not measured"
            return shown, None, reason
        if least is None or least[1] is None or forgotten.value < least[1].value:
            least = shown, forgotten, ""
    assert least is not None
    return least


def _gone(name: str, forgotten: Estimate | None, reason: str) -> str:
    if forgotten is None:
        return f"whether {name} is gone is unknown: {reason}"
    return f"{name} is gone from {forgotten.text()} of the images of its prompts"


def _others(metrics: Mapping[str, Any]) -> tuple[str, bool]:
    """What became of other prompts, and whether the model is damaged."""
    before, after = _known(metrics, "ra_before"), _known(metrics, "ra_after")
    drift = _known(metrics, "image_drift")
    moved = drift is not None and drift.value >= DRIFT
    drifted = f"images of other prompts drifted by {drift.value:.2f} (1: unrelated images)" if drift is not None else ""
    if before is None or after is None or moved:
        return drifted, moved
    drop = before.value - after.value
    text = f"images of other prompts are as prompted in {after.text()} of cases (before: {before.value:.1f} %)"
    return text, drop >= DAMAGE and drop > hypot(before.half_width, after.half_width)


def _known(values: Mapping[str, Any], key: str) -> Estimate | None:
    value = from_json(values.get(key))
    return value if isinstance(value, Estimate) else None
