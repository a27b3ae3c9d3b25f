"""Did it work? One verdict on an erasure, the same at the command line, in reports, in the tab and in nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from math import sqrt
from typing import Any

from salun.evaluation.estimate import Estimate, from_json
from salun.evaluation.further_sets import DAMAGE, harmed, lost_of, still_shown
from salun.methods import METHODS, Method

ERASED, MOSTLY = 95.0, 50.0  # percent of images without the concept
SURE = 80.0  # the interval of "erased" begins here or above
DRIFT = 0.5  # image drift; 1 is that of unrelated images
DIVERSITY = 0.5  # of images of other prompts, relative to the original's
UNMOVED = 0.1  # of the way to the anchor, which the concept's predictions moved
FEWEST = 8  # images of a concept


class Outcome(str, Enum):
    """What a verdict says."""

    ERASED = "erased"
    MOSTLY = "mostly erased"
    BARELY = "barely changed"
    DAMAGED = "damaged"
    UNKNOWN = "can't tell"

    __str__ = str.__str__


GENTLER = "Use a goal that allows less harm ({until})", ", or raise {retain_weight}"  # for a run that trained to one,
STRICTER = "Use a stricter goal ({until})", ", or {target_guidance} 0.25"  # and for a method with such options
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
    """The verdict on metrics, as in `run.json` or `eval.json`; of several concepts the least erased one decides.

    The advice is on the options of the method that the metrics name; one that is not known is taken for SalUn. Further
    sets of prompts can only lower the verdict, and other detectors are named where they say something else.
    """
    verdict, shown, suffers = _by_held_out(metrics), still_shown(metrics), harmed(metrics)
    others = {name: _by_held_out(of).outcome for name, of in (metrics.get("detectors") or {}).items()}
    differ = [f"by the detector {name}: {of}" for name, of in others.items() if of is not verdict.outcome]
    outcome, advice = verdict.outcome, verdict.advice
    if outcome is Outcome.ERASED and shown:
        outcome, advice = Outcome.MOSTLY, _stronger(metrics)
    elif outcome is Outcome.ERASED and suffers:
        advice = _weaker(metrics)
    return Verdict(outcome, "; ".join(filter(None, (verdict.text, shown, suffers, *differ))), advice)


def _method(metrics: Mapping[str, Any]) -> Method:
    return METHODS["diffusion"].get(str(metrics.get("method")), METHODS["diffusion"]["salun"])


def _stronger(metrics: Mapping[str, Any]) -> str:
    return _by_goal(STRICTER, metrics) if metrics.get("goal") else _method(metrics).stronger


def _weaker(metrics: Mapping[str, Any]) -> str:
    return _by_goal(GENTLER, metrics) if metrics.get("goal") else _method(metrics).weaker


def _by_goal(advice: tuple[str, str], metrics: Mapping[str, Any]) -> str:
    return "".join(advice) if _method(metrics).grows else advice[0]


def _by_held_out(metrics: Mapping[str, Any]) -> Verdict:
    """By images of held-out prompts of the concepts and of others."""
    stronger = _stronger(metrics)
    name, forgotten, reason = _least_erased(metrics)
    gone = _gone(name, forgotten, reason)
    others, harm = _others(metrics)
    moved = _moved(metrics)
    way = f"the network's predictions moved {100 * moved:.0f} % of the way to the anchor's" if moved is not None else ""
    if harm is Harm.SURE:
        return _verdict(Outcome.DAMAGED, _weaker(metrics), others, gone)
    if forgotten is not None and forgotten.n >= FEWEST:
        outcome = _outcome(forgotten)
        more = f"Use {{eval_images}} {max(ENOUGH, 2 * forgotten.n)} or more: so few images cannot show more"
        if outcome is Outcome.ERASED:
            return _verdict(outcome, more if harm is Harm.LIKELY else LOOK, gone, others)
        advice = more if forgotten.value >= ERASED or harm is Harm.LIKELY else stronger
        return _verdict(outcome, advice, gone, way if outcome is Outcome.BARELY else "", others)
    if moved is not None and moved <= UNMOVED:
        return _verdict(Outcome.BARELY, stronger, way, others)
    return _verdict(Outcome.UNKNOWN, _next(metrics, forgotten), gone, others)


def _next(metrics: Mapping[str, Any], forgotten: Estimate | None) -> str:
    """What to do where nothing is known, by its cause."""
    if forgotten is not None or metrics.get("cause") == "no images":
        return "Look at the images, and use {eval_images} 16 or more"
    if metrics.get("cause") == "no original":
        return "Name the original model ({against}) to compare with"
    calibrated = [of.get("calibration") or {} for of in (metrics.get("per_concept") or {}).values()]
    blind = any(each.get("reason") for each in calibrated)
    return "Look at the images, or use another {detector}" if blind else "Look at the images"


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


def _moved(metrics: Mapping[str, Any]) -> float | None:
    """How far the concept's predictions moved; 1 is as far as the anchor's. None where that is unknown."""
    change, gap = _known(metrics, "forget_change"), _known(metrics, "anchor_gap")
    if change is not None:
        return sqrt(change.value)
    return abs(1 - sqrt(gap.value)) if gap is not None else None  # of a run before the change was measured


class Harm(Enum):
    """Whether images of other prompts suffer."""

    NONE = 0
    LIKELY = 1  # by a difference that chance may make
    SURE = 2


def _others(metrics: Mapping[str, Any]) -> tuple[str, Harm]:
    """What became of other prompts, and whether they suffer."""
    before, after = _known(metrics, "ra_before"), _known(metrics, "ra_after")
    drift, diversity = _known(metrics, "image_drift"), _known(metrics, "image_diversity")
    if diversity is not None and diversity.n >= FEWEST and diversity.value < DIVERSITY:
        return f"images of other prompts have lost {100 * (1 - diversity.value):.0f} % of their diversity", Harm.SURE
    moved = drift is not None and drift.value >= DRIFT
    drifted = f"images of other prompts drifted by {drift.value:.2f} (1: unrelated images)" if drift is not None else ""
    if before is None or after is None or moved:
        return drifted, Harm.SURE if moved else Harm.NONE
    text = f"images of other prompts are as prompted in {after.text()} of cases (before: {before.value:.1f} %)"
    drop = _known(metrics, "ra_drop")
    if drop is not None:
        lost, least = drop.value, drop.low if drop.low is not None else 0.0
    else:  # of a run before images were compared one by one
        lost, least = lost_of(before, after)
    if lost < DAMAGE:
        return text, Harm.NONE
    return (text, Harm.SURE) if least > 0 else (f"{text}, which may be chance", Harm.LIKELY)


def _known(values: Mapping[str, Any], key: str) -> Estimate | None:
    value = from_json(values.get(key))
    return value if isinstance(value, Estimate) else None
