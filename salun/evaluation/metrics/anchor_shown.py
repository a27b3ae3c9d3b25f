"""Is the anchor shown in place of the concept?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def anchor_shown(pair: EvaluationPair) -> Value:
    """Images of forget prompts in which the anchor is detected."""
    anchors = {concept.name: concept.anchor for concept in pair.concepts if concept.anchor is not None}
    if len(anchors) < len(pair.concepts):
        return Unknown("an anchor is the empty prompt, which no detector can detect")
    return pair.cannot_tell() or Estimate.percentage(
        pair.forget_images(lambda c: pair.after.forget.shows(c.attribute, anchors[c.name], c.rows)),
        pair.prompts_of_images(),
    )


def _finding(before: Estimate, after: Estimate, concept: Mapping[str, Any]) -> str:
    return f"Its anchor, “{concept['anchor']}”, is detected in {after.value:.0f} % of them."


ANCHOR_SHOWN = Metric("anchor", "Anchor shown", "higher", "%", anchor_shown, per_concept=True, finding=_finding)
