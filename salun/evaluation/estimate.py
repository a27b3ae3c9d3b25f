"""A measured value: an estimate with its sample count and interval, or unknown for a stated reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value, the number of samples behind it and its 95 % interval (None where no interval is defined)."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    @classmethod
    def percentage(cls, hits: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
        """The percentage of True in a boolean array (n,), n > 0, with Wilson's interval.

        Args:
            groups: (n,), equal for samples that may depend on each other, such as images of one prompt; the interval
                is then that of as many independent samples as give the variance between groups (Korn & Graubard 1998).
                None where all are independent.
        """
        n, k = len(hits), int(np.count_nonzero(hits))
        if not n:
            raise ValueError("a percentage needs at least one sample")
        p, m = k / n, float(n) if groups is None else independent(hits, groups)
        d = 1 + Z * Z / m
        middle, half = (p + Z * Z / (2 * m)) / d, Z * sqrt(p * (1 - p) / m + Z * Z / (4 * m * m)) / d
        return cls(100 * p, n, 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0))

    @classmethod
    def mean(cls, values: np.ndarray) -> Estimate:
        """The mean of numbers (n,), n > 0, with its normal interval; a single number has none."""
        n = len(values)
        if not n:
            raise ValueError("a mean needs at least one sample")
        middle = float(np.mean(values))
        if n == 1:
            return cls(middle, n)
        half = Z * float(np.std(values, ddof=1)) / sqrt(n)
        return cls(middle, n, middle - half, middle + half)

    @property
    def half_width(self) -> float:
        """Half the width of the interval, 0 where there is none."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2

    def as_json(self) -> dict[str, float | int | None]:
        """As in `run.json`."""
        return asdict(self)

    def text(self, unit: str = "%", digits: int = 1) -> str:
        """For people: "97.5 % (91.3–99.3, n = 80)"."""
        unit = f" {unit}" if unit else ""
        ends = f"{self.low:.{digits}f}–{self.high:.{digits}f}, " if None not in (self.low, self.high) else ""
        return f"{self.value:.{digits}f}{unit} ({ends}n = {self.n:,})"


def independent(hits: np.ndarray, groups: np.ndarray) -> float:
    """Independent samples whose proportion has the variance of these, from the number of groups to that of samples."""
    n, p = len(hits), float(hits.mean())
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    if count in (1, n) or p in (0.0, 1.0):  # where all agree, nothing shows that they depend on each other
        return float(n)
    residuals = np.bincount(group.ravel(), weights=hits - p)
    variance = count / (count - 1) * float(np.square(residuals).sum()) / n**2
    return min(max(p * (1 - p) / variance, float(count)), float(n)) if variance else float(n)


@dataclass(frozen=True)
class Unknown:
    """A value that could not be measured, and why."""

    reason: str

    def as_json(self) -> None:
        """As in `run.json`, which keeps the reason in `reasons`."""

    def text(self, unit: str = "%", digits: int = 1) -> str:
        """For people."""
        return "unknown"


Value = Estimate | Unknown


def from_json(value: Mapping[str, Any] | None, reason: str = "") -> Value:
    """The value that `as_json` gave. Raises TypeError for anything else."""
    return Estimate(**value) if value is not None else Unknown(reason)
