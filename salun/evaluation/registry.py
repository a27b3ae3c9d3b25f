"""The metrics of an erasure, and their values as in `run.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salun.evaluation.estimate import Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric
from salun.evaluation.metrics.anchor_shown import ANCHOR_SHOWN
from salun.evaluation.metrics.forgotten import UA, UA_CORRECTED
from salun.evaluation.metrics.frechet import FRECHET
from salun.evaluation.metrics.image_diversity import IMAGE_DIVERSITY
from salun.evaluation.metrics.image_drift import IMAGE_DRIFT
from salun.evaluation.metrics.prediction_drift import ANCHOR_GAP, FORGET_CHANGE, RETAIN_CHANGE
from salun.evaluation.metrics.preserved import PRESERVED, PRESERVED_BY_ATTRIBUTE
from salun.evaluation.metrics.prompt_asr import PROMPT_ASR
from salun.evaluation.metrics.retain_accuracy import RA, RA_BY_ATTRIBUTE, RA_BY_CLASS
from salun.evaluation.metrics.retain_drop import RA_DROP
from salun.evaluation.metrics.unclassified import UNCLASSIFIED

METRICS = (  # in the order in which they are shown
    UA,
    UA_CORRECTED,
    PROMPT_ASR,
    ANCHOR_SHOWN,
    PRESERVED,
    PRESERVED_BY_ATTRIBUTE,
    UNCLASSIFIED,
    RA,
    RA_DROP,
    RA_BY_ATTRIBUTE,
    RA_BY_CLASS,
    FRECHET,
    IMAGE_DRIFT,
    IMAGE_DIVERSITY,
    ANCHOR_GAP,
    FORGET_CHANGE,
    RETAIN_CHANGE,
)


def measure(pair: EvaluationPair, metrics: Sequence[Metric] = METRICS) -> dict[str, Any]:
    """The values of all metrics as JSON.

    Returns:
        A metric's key → its value, and the key that ends in "_before" → the original's; of a breakdown part → both.
        An unknown value is None; `reasons` has the reason by the metric's key. `per_concept` has the same of each
        concept; `reason` is why nothing was detected, where nothing was.
    """
    values = _measured(metrics, pair)
    if "detections" in pair.unknown:
        values["reason"] = pair.unknown["detections"]
    else:
        by_concept = [metric for metric in metrics if metric.per_concept]
        values["per_concept"] = {
            concept.name: _measured(by_concept, pair.of(concept)) | {"calibration": pair.calibration(concept).as_json()}
            for concept in pair.concepts
        }
    return values


def _measured(metrics: Sequence[Metric], pair: EvaluationPair) -> dict[str, Any]:
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for metric in metrics:
        before, after = (_value(metric, side) for side in (pair.unchanged(), pair))
        if isinstance(after, Mapping) and isinstance(before, Mapping):
            sides = {part: {"before": before[part].as_json(), "after": after[part].as_json()} for part in after}
            values[metric.key] = sides
            continue
        assert not isinstance(after, Mapping) and not isinstance(before, Mapping)
        values[metric.key] = after.as_json()
        if not metric.breakdown:
            values[metric.key_before] = before.as_json()
        if isinstance(after, Unknown):
            reasons[metric.key] = after.reason
    return {**values, "reasons": reasons}


def _value(metric: Metric, pair: EvaluationPair) -> Value | Mapping[str, Value]:
    reason = pair.unknown.get(metric.needs)
    return Unknown(reason) if reason is not None else metric.compute(pair)
