"""Retain accuracy: are other prompts still followed, in all, by attribute and by class?"""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def _right(pair: EvaluationPair) -> dict[str, np.ndarray]:
    """Attribute → whether each retain image shows the expected label, bool (n,)."""
    return {name: pair.after.retain.shows(name, expected) for name, expected in pair.expected_retain.items()}


def retain_accuracy(pair: EvaluationPair) -> Value:
    """What images of other prompts show as prompted; an invalid image shows nothing."""
    right = list(_right(pair).values())
    if not right:
        return Unknown("the detector knows no other prompts")
    images = np.concatenate([np.arange(len(hits)) for hits in right])  # one image counts once for each attribute
    return Estimate.percentage(np.concatenate(right), images)


def by_attribute(pair: EvaluationPair) -> dict[str, Value]:
    """Images of other prompts that show this attribute as prompted."""
    right = _right(pair)
    return {name: Estimate.percentage(hits) for name, hits in right.items()} if len(right) > 1 else {}


def by_class(pair: EvaluationPair) -> dict[str, Value]:
    """Images whose prompts name this class and that show it."""
    right, expected = _right(pair), pair.expected_retain
    return {
        f"{name}: {label}": Estimate.percentage(right[name][expected[name] == i])
        for name in right
        for i, label in enumerate(pair.labels[name])
        if np.any(expected[name] == i)
    }


RA = Metric("ra_after", "Retain accuracy (RA)", "higher", "%", retain_accuracy)
RA_BY_ATTRIBUTE = Metric("ra_by_attribute", "Retain accuracy by attribute", "higher", "%", by_attribute, breakdown=True)
RA_BY_CLASS = Metric("per_class", "Retain accuracy by class", "higher", "%", by_class, breakdown=True)
