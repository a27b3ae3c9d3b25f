"""What a detector's word is worth: how it does on the original model's own images.

A detector that misses the concept in the original's images, or sees it in images of other prompts, measures nothing.
Its rates on the original correct what it sees in the erased model's images (Rogan & Gladen 1978). They are counted on
images that chose nothing: where timesteps or a threshold were chosen, a detector looks better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value, independent

MIN_AUC, MIN_GAP = 0.8, 0.3  # below either, a detector cannot tell
CLEARLY = 0.05  # by which another threshold must be better
DRAWS = 2000  # of the bootstrap
FEWEST, FITTED, MANY = 8, 24, 100  # images of each kind on which a detector is fitted: at least, usually, at most


@dataclass(frozen=True, eq=False)
class Calibration:
    """A detector's decisions and scores on the original's images.

    Args:
        positives: bool (n,), whether the concept is detected in images of its own prompts.
        negatives: bool (m,), likewise in images of the anchor's and of other prompts.
        auc: Area under the ROC curve of the scores.
        threshold: Of the scores, by which the decisions were made.
        prompts: (n,), of the positives; None where every image counts as independent.
    """

    positives: np.ndarray
    negatives: np.ndarray
    auc: float
    threshold: float = 0.0
    prompts: np.ndarray | None = None

    @classmethod
    def of_scores(
        cls,
        positives: np.ndarray,
        negatives: np.ndarray,
        threshold: float,
        chosen_on: tuple[np.ndarray, np.ndarray] | None = None,
        prompts: np.ndarray | None = None,
    ) -> Calibration:
        """From the concept's scores (n,) and (m,); one counts as detected from the threshold on.

        Args:
            prompts: As in the class.
            chosen_on: Scores of other images of both kinds, on which another threshold is chosen where that separates
                the two clearly better; None to keep the given one.
        """
        if chosen_on is not None:
            threshold = adjusted(*chosen_on, threshold)
        return cls(positives >= threshold, negatives >= threshold, auc(positives, negatives), threshold, prompts)

    @classmethod
    def of_fitted(cls, positives: np.ndarray, negatives: np.ndarray, threshold: float) -> Calibration:
        """As `of_scores`, of a detector that was fitted on those that `fitting` names; they choose the threshold."""
        on = [fitting(len(each)) for each in (positives, negatives)]
        return cls.of_scores(positives[~on[0]], negatives[~on[1]], threshold, (positives[on[0]], negatives[on[1]]))

    @property
    def reason(self) -> str | None:
        """Why the detector cannot tell whether the concept is there, or None where it can."""
        if not len(self.positives) or not len(self.negatives):
            return "there are no images of the original to calibrate the detector on"
        seen, false = 100 * self.positives.mean(), 100 * self.negatives.mean()
        if seen - false < 100 * MIN_GAP or self.auc < MIN_AUC:
            return (
                f"the detector cannot tell, or the original rarely draws it: on the original model, the concept is "
                f"detected in {seen:.0f} % of the images of its prompts and in {false:.0f} % of others (AUC "
                f"{self.auc:.2f})"
            )
        return None

    def corrected(self, detected: np.ndarray, prompts: np.ndarray | None = None) -> Value:
        """The percentage of images without the concept, corrected for misses and false alarms.

        100 · (1 − (rate − p₀) / (p₁ − p₀)), with an interval by bootstrap over the images and the calibration.
        Value and interval may lie below 0 or above 100: cut off there, the mean of many would be biased.

        Args:
            detected: bool (n,), n > 0.
            prompts: (n,), whose images depend on each other; None where all are independent.
        """
        if self.reason is not None:
            return Unknown(self.reason)
        rng = np.random.default_rng(0)
        parts = (detected, prompts), (self.positives, self.prompts), (self.negatives, None)
        rates = [_resampled(*part, rng) for part in parts]
        drawn = _without(*rates)
        value = _without(detected.mean(), self.positives.mean(), self.negatives.mean())
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Estimate(float(value), len(detected), float(low), float(high))

    def corrected_rate(self, detected: np.ndarray, prompts: np.ndarray | None = None) -> Value:
        """The percentage of images that show the concept, corrected likewise.

        Args:
            detected: bool (n,), n > 0, by `threshold`.
            prompts: As in `corrected`.
        """
        without = self.corrected(detected, prompts)
        if isinstance(without, Unknown) or without.low is None or without.high is None:
            return without
        return Estimate(100 - without.value, without.n, 100 - without.high, 100 - without.low)

    def as_json(self) -> dict[str, Any]:
        """As in `run.json`."""
        rates: Mapping[str, np.ndarray] = {"detected": self.positives, "false_alarms": self.negatives}
        values = {name: Estimate.percentage(part).as_json() if len(part) else None for name, part in rates.items()}
        known = None if np.isnan(self.auc) else self.auc
        return {**values, "auc": known, "threshold": self.threshold, "reason": self.reason}


def fitting(n: int) -> np.ndarray:
    """Which of n images to fit a detector on, bool (n,): `FITTED`, of many a fifth up to `MANY`, at most half; or none.

    The others calibrate it: on the images that it was fitted on, even a detector that sees nothing looks good.
    """
    chosen, count = np.zeros(n, bool), min(max(FITTED, n // 5), MANY, n // 2)
    if count >= FEWEST:
        chosen[np.linspace(0, n - 1, count).round().astype(int)] = True
    return chosen


def fitting_rounds(a: int, b: int) -> list[int]:
    """Images that each round of a fit looks at: few of both kinds, more, and all, these twice.

    Args:
        a, b: Images of each kind.
    """
    again = [a, b] if max(a, b) > FITTED else []
    return [min(a, FEWEST), min(b, FEWEST), min(a, FITTED), min(b, FITTED), *again, a, b]


def fitting_passes(a: int, b: int, each: Sequence[int]) -> int:
    """Passes of the network in the `fitting_rounds` of a and b images.

    Args:
        each: Of an image in the first round, the second, and each further one.
    """
    first, second, further = each
    of_rounds = [first] * 2 + [second] * 2 + [further] * len(fitting_rounds(a, b))
    return sum(images * passes for images, passes in zip(fitting_rounds(a, b), of_rounds, strict=False))


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive's score is above a negative's, ties counted half; NaN of none."""
    if not len(positives) or not len(negatives):
        return float("nan")
    ordered = np.sort(negatives)
    below, upto = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negatives))


def adjusted(positives: np.ndarray, negatives: np.ndarray, threshold: float) -> float:
    """The threshold with the greatest difference between detections and false alarms (Youden 1950).

    The given one, unless another is better by `CLEARLY`: the best of many on few images is partly chance.

    Args:
        positives, negatives: Scores (n,) and (m,).
    """
    if not len(positives) or not len(negatives):
        return threshold
    scores = np.unique(np.concatenate([positives, negatives]))
    scores = scores[np.isfinite(scores)]
    between = np.append((scores[1:] + scores[:-1]) / 2, threshold)
    ordered = np.sort(positives), np.sort(negatives)
    above = [1 - np.searchsorted(each, between) / len(each) for each in ordered]
    gaps = above[0] - above[1]
    best = int(np.argmax(gaps))
    return float(between[best]) if gaps[best] >= gaps[-1] + CLEARLY else threshold


def _resampled(hits: np.ndarray, groups: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Rates of `DRAWS` bootstrap samples; a rate is drawn from its posterior, so that none is certain (Jeffreys)."""
    n = len(hits) if groups is None else independent(hits, groups)
    k = n * np.count_nonzero(hits) / len(hits)
    return rng.beta(k + 0.5, n - k + 0.5, DRAWS)


def _without(rate: Any, seen: Any, false: Any) -> Any:
    """The percentage without the concept."""
    return 100 * (1 - (rate - false) / np.maximum(seen - false, 1e-6))
