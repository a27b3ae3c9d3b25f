"""Unlearning accuracy: is the concept gone from images of its prompts?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.evaluation.estimate import Estimate
from salun.evaluation.metric import EvaluationPair, Metric


def unlearning_accuracy(pair: EvaluationPair) -> Estimate:
    """Images of forget prompts in which the concept is not detected; an invalid image counts as forgotten."""
    return Estimate.percentage(~pair.forget_images(lambda c: pair.after.forget.shows(c.attribute, c.label, c.rows)))


def _finding(before: Estimate, after: Estimate, concept: Mapping[str, Any]) -> str:
    left, was = (round(value.n * (100 - value.value) / 100) for value in (after, before))
    verdict = "forgot" if after.value >= 95 else "mostly forgot" if after.value >= 80 else "did not forget"
    return (
        f"The model {verdict} “{concept['name']}”: {left or 'none'} of {after.n} images of its prompts show it "
        f"(before: {was})."
    )


UA = Metric("ua", "Forgotten (UA)", "higher", "%", unlearning_accuracy, per_concept=True, finding=_finding)
