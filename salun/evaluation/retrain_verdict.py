"""Did a classifier forget? Its distance from Retrain compared with that of the original, which forgot nothing."""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot
from typing import Any

from salun.evaluation.estimate import Estimate, from_json
from salun.evaluation.further_sets import DAMAGE
from salun.evaluation.verdict import Outcome, Verdict

COMPARED = ("UA", "RA", "TA", "MIA")  # what the mean gap is of
CLOSE = 1.0  # percentage points of the mean gap: as near to Retrain as one run can tell
ERASED, MOSTLY = 0.2, 0.7  # of the original's gap

ADVICE = {
    Outcome.ERASED: "Compare over several seeds by `salun classify-compare`",
    Outcome.MOSTLY: "Let {search} choose the method's strength, or train for more {epochs}",
    Outcome.BARELY: "Let {search} choose the method's strength, or raise {lr}",
    Outcome.DAMAGED: "Lower {lr} or {epochs}, or let {search} choose the method's strength",
}
MORE = "Forget more images, or compare over several seeds by `salun classify-compare`"
NOTHING = "Set {forget} to a class, or {data} to clutter, where there is something to forget"


def verdict_on_classifier(metrics: Mapping[str, Any]) -> Verdict:
    """The verdict on an unlearned classifier's metrics, as in `run.json`.

    The gap is the mean over UA, RA, TA and MIA of the distance to Retrain, in percentage points. It says nothing where
    the original's own gap is small: then there was nothing to forget. Nor where the sets are so small that the
    intervals of the two gaps overlap, unless these are narrow enough to show that little has changed.
    """
    gap, idle = metrics["gap_mean"], metrics["gap_original"]
    if gap is None or idle is None:
        before, after = (from_json(side["UA"]).text() for side in (metrics["original"], metrics))
        why = f"How near it is to Retrain is unknown: {metrics['reason']}"
        text = f"{why}; error on the forget set {after}, before {before}"
        return Verdict(Outcome.UNKNOWN, text, "Set {retrain} to yes, or compare by another run")
    distance = f"Its mean gap to Retrain is {gap:.2f} points, that of the original, which forgot nothing, {idle:.2f}"
    if lost := _lost(metrics):
        return _verdict(Outcome.DAMAGED, f"{distance}; {lost}")
    if idle <= CLOSE and gap <= idle + CLOSE:
        return Verdict(Outcome.UNKNOWN, f"{distance}: there was nothing to forget", NOTHING)
    error = hypot(gap_half_width(metrics, metrics["retrain"]), gap_half_width(metrics["original"], metrics["retrain"]))
    if abs(gap - idle) <= error and error > (1 - MOSTLY) * idle:
        fewest = min(int(metrics[name]["n"]) for name in COMPARED if name in metrics)
        return Verdict(Outcome.UNKNOWN, f"{distance}: too few images to tell (n = {fewest})", MORE)
    return _verdict(gap_outcome(gap, idle, error=error), distance)


def gap_half_width(model: Mapping[str, Any], retrain: Mapping[str, Any]) -> float:
    """Half the width of the 95 % interval of a model's mean gap to Retrain, as if its parts were independent."""
    widths = [
        value.half_width
        for name in COMPARED
        for side in (model, retrain)
        if isinstance(value := from_json(side.get(name)), Estimate)
    ]
    return hypot(*widths) / len(COMPARED)


def gap_outcome(gap: float, idle: float, chance: float = CLOSE, error: float = 0.0) -> Outcome:
    """What a mean gap to Retrain means.

    Args:
        gap, idle: Of the unlearned model and of the original, in percentage points.
        chance: The gap that exact unlearning has too.
        error: Half the width of the interval of the difference between the two.
    """
    if gap > idle + max(CLOSE, error):
        return Outcome.DAMAGED
    if gap <= max(chance, ERASED * idle):
        return Outcome.ERASED
    return Outcome.MOSTLY if gap <= MOSTLY * idle else Outcome.BARELY


def verdict_on_comparison(table: Mapping[str, Any]) -> Verdict | None:
    """What the method nearest to Retrain achieved, against doing nothing and against chance; None without a result.

    table: as of `table_of` in `salun.classification.table`.
    """
    known = [(row["gap_mean"]["mean"], row["title"]) for row in table["methods"].values() if row["gap_mean"]["n"]]
    idle = table["original"]["gap_mean"]["mean"]
    if not known or idle is None:
        return None
    gap, title = min(known)
    chance = table["again"]["gap_mean"]["mean"] if table["again"] is not None else None
    text = f"{title} comes nearest to Retrain: a mean gap of {gap:.2f} points, of the original {idle:.2f}"
    if chance is not None:
        text += f", by chance {chance:.2f}"
    if idle <= (chance or CLOSE):
        return Verdict(Outcome.UNKNOWN, f"{text}: there was nothing to forget", NOTHING)
    outcome = gap_outcome(gap, idle, CLOSE if chance is None else chance)
    return Verdict(outcome, text, "Read the table below; a smaller gap is better")


def _verdict(outcome: Outcome, text: str) -> Verdict:
    return Verdict(outcome, text, ADVICE[outcome])


def _lost(metrics: Mapping[str, Any]) -> str:
    """How much accuracy on other images was lost against Retrain, "" where it is not clearly more than `DAMAGE`."""
    for name, what in (("TA", "test images"), ("RA", "the retain set")):
        ours, exact = from_json(metrics[name]), from_json(metrics["retrain"][name])
        assert isinstance(ours, Estimate) and isinstance(exact, Estimate)
        lost = exact.value - ours.value
        if lost >= DAMAGE and lost > hypot(ours.half_width, exact.half_width):
            return f"accuracy on {what} is {ours.value:.1f} %, of Retrain {exact.value:.1f} %"
    return ""
