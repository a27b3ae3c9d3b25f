"""Is the rest of a forget prompt still followed, such as color and style where a shape is erased?"""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, ExpectedConcept, Metric


def _right(pair: EvaluationPair, concept: ExpectedConcept) -> dict[str, np.ndarray]:
    """Attribute but the concept's → whether its forget images show the expected label."""
    rows, shows = concept.rows, pair.after.forget.shows
    others = [name for name in pair.expected_forget if name != concept.attribute]
    return {name: shows(name, pair.expected_forget[name][rows], rows) for name in others}


def preserved(pair: EvaluationPair) -> Value:
    """Images of forget prompts in which every other attribute is as prompted."""
    if not any(_right(pair, concept) for concept in pair.concepts):
        return Unknown("the detector has no attribute other than the concept's")
    return Estimate.percentage(pair.forget_images(lambda c: np.logical_and.reduce(list(_right(pair, c).values()))))


def preserved_by_attribute(pair: EvaluationPair) -> dict[str, Value]:
    """Images of forget prompts in which this attribute is as prompted; concepts of the same attribute are skipped."""
    rights = [_right(pair, concept) for concept in pair.concepts]
    parts = {name: [right[name] for right in rights if name in right] for name in pair.labels}
    return {name: Estimate.percentage(np.concatenate(hits)) for name, hits in parts.items() if hits}


PRESERVED = Metric("preserved", "Other attributes preserved", "higher", "%", preserved, per_concept=True)
PRESERVED_BY_ATTRIBUTE = Metric(
    "preserved_by_attribute",
    "Other attributes preserved, by attribute",
    "higher",
    "%",
    preserved_by_attribute,
    per_concept=True,
    breakdown=True,
)
