"""Fréchet distance of detector features on retain images: how much did images of other prompts change as a set?"""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, eq. 6).

    tr √(Σ_a Σ_b) is taken from the eigenvalues of √Σ_a Σ_b √Σ_a, which is symmetric. Raises ValueError for fewer than
    2 samples on a side.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a Fréchet distance needs at least two samples on each side")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet(pair: EvaluationPair) -> Value:
    """Between detector features of retain images of both models; before: of the original alone, the noise floor.

    First half of the original's images against the second half of the other model's. With few images it is too large.
    """
    before, after = pair.before.retain.features, pair.after.retain.features
    if before is None or after is None:
        return Unknown("the detector has no features")
    half, width = len(before) // 2, before.shape[1]
    if half <= width:
        return Unknown(f"a Fréchet distance of {width:,} features needs more than {2 * width:,} images")
    return Estimate(frechet_distance(before[:half], after[half:]), half)


FRECHET = Metric("frechet", "Fréchet distance", "lower", "", frechet)
