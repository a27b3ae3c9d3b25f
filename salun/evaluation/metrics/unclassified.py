"""Are there images that the detector no longer recognizes as valid: destroyed rather than forgotten?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def unclassified(pair: EvaluationPair) -> Value:
    """Images of forget prompts that are invalid: destroyed rather than forgotten."""
    valid = pair.after.forget.valid
    if valid is None:
        return Unknown("the detector cannot recognize invalid images")
    return Estimate.percentage(~pair.forget_images(lambda c: valid[c.rows]))


def _finding(before: Estimate, after: Estimate, concept: Mapping[str, Any]) -> str:
    return f"Warning: {after.value:.0f} % of the images are no longer valid." if after.value > 5 else ""


UNCLASSIFIED = Metric("unclassified", "Unclassified", "lower", "%", unclassified, per_concept=True, finding=_finding)
