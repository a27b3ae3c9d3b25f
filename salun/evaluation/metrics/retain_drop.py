"""How many images of other prompts are no longer as prompted, image by image."""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric, ModelEvaluation


def retain_drop(pair: EvaluationPair) -> Value:
    """Images of other prompts that were as prompted and no longer are, less those that only now are.

    At equal prompts and seeds, so that what both models get wrong widens no interval.
    """
    if not pair.expected_retain:
        return Unknown("the detector knows no other prompts")
    before, after = (_part_right(pair, side) for side in (pair.before, pair.after))
    return Estimate.mean(100 * (before - after))


def _part_right(pair: EvaluationPair, side: ModelEvaluation) -> np.ndarray:
    """Of each retain image, which part of the expected attributes it shows, float (n,)."""
    right = [side.retain.shows(name, expected) for name, expected in pair.expected_retain.items()]
    part: np.ndarray = np.mean(right, axis=0)
    return part


RA_DROP = Metric("ra_drop", "RA lost", "lower", "points", retain_drop)
