"""Unlearning accuracy: is the concept gone from images of its prompts?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def unlearning_accuracy(pair: EvaluationPair) -> Value:
    """Images of forget prompts in which the concept is not detected; an invalid image counts as forgotten."""
    return pair.cannot_tell() or Estimate.percentage(~pair.forget_images(pair.shown), pair.prompts_of_images())


def corrected(pair: EvaluationPair) -> Value:
    """The same, corrected for what the detector misses and imagines on the original model's images; 0 to 100."""
    values = [
        pair.calibration(concept).corrected(pair.shown(concept), pair.prompts_of(concept)) for concept in pair.concepts
    ]
    known = [value for value in values if isinstance(value, Estimate)]
    if len(known) < len(values):
        return pair.cannot_tell() or Unknown("there is no concept")
    return mean(known)


def mean(values: Sequence[Estimate]) -> Estimate:
    """The mean of independent percentages; each side of its interval is the root of the mean square, over √k.

    Each may lie below 0 or above 100; their mean is cut off there.
    """
    k = len(values)
    value = sum(each.value for each in values) / k
    down, up = (
        sqrt(sum((each.value - end) ** 2 for each in values if (end := getattr(each, name)) is not None)) / k
        for name in ("low", "high")
    )
    value, low, high = (min(max(each, 0.0), 100.0) for each in (value, value - down, value + up))
    return Estimate(value, sum(each.n for each in values), low, high)


def _finding(before: Estimate, after: Estimate, concept: Mapping[str, Any]) -> str:
    left, was = (round(value.n * (100 - value.value) / 100) for value in (after, before))
    return f"{left or 'None'} of {after.n} images of prompts of “{concept['name']}” show it (before: {was})."


UA = Metric("ua", "Forgotten (UA)", "higher", "%", unlearning_accuracy, per_concept=True, finding=_finding)
UA_CORRECTED = Metric("ua_corrected", "Forgotten, corrected (UA)", "higher", "%", corrected, per_concept=True)
