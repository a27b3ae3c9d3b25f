"""Figures and how far they can be trusted: proportions with intervals, Fréchet distance."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np


@dataclass(frozen=True)
class Proportion:
    """A proportion in percent with its sample count and 95 % Wilson interval."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: np.ndarray) -> Proportion:
        """The share of True in a boolean array (n,), n > 0."""
        n, k = len(hits), int(np.count_nonzero(hits))
        if not n:
            raise ValueError("a share of nothing is not defined")
        z = 1.959964
        p, d = k / n, 1 + z * z / n
        middle, half = (p + z * z / (2 * n)) / d, z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
        return cls(100 * p, n, 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0))

    def json(self) -> dict[str, float | int]:
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, eq. 6).

    tr √(Σ_a Σ_b) is taken from the eigenvalues of √Σ_a Σ_b √Σ_a, which is symmetric. Needs at least 2 of each.
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
