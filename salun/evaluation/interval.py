"""Differences in pairs: their mean with its 95 % interval, which few pairs make wide."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, pi, sin, sqrt
from statistics import mean, median, stdev
from typing import Any

import numpy as np

DRAWS = 10_000  # of the bootstrap


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean of differences, its 95 % interval by Student's t (low, high) and by the bootstrap, and their median.

    bootstrap: percentiles of the means of 10,000 seeded draws of n with replacement; unlike t it does not assume
    symmetry, which outliers break. All intervals are None for fewer than two differences.
    """
    n = len(values)
    summary = {"mean": mean(values) if values else None, "median": median(values) if values else None, "n": n}
    if n < 2:
        return {**summary, "low": None, "high": None, "bootstrap": None}
    half = student_t(n - 1) * stdev(values) / sqrt(n)
    drawn = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    means = np.asarray(values)[drawn].mean(1)
    bootstrap = [float(end) for end in np.percentile(means, (2.5, 97.5))]
    return {**summary, "low": mean(values) - half, "high": mean(values) + half, "bootstrap": bootstrap}


def student_t(freedom: int, coverage: float = 0.95) -> float:
    """t with P(|T| <= t) = coverage, T of Student's distribution with these degrees of freedom (without SciPy)."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < coverage:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < coverage else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t), by Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term = total = cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos(angle) ** 2
        total += term
    if not odd:
        return sin(angle) * total
    return 2 / pi * (angle + (sin(angle) * total if freedom > 1 else 0.0))
