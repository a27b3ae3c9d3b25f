"""How far the images of other prompts moved at equal seeds, which needs no detector."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric

if TYPE_CHECKING:
    from torch import Tensor


def image_drift(pair: EvaluationPair) -> Value:
    """Squared distance between latents of other prompts at equal seeds; 1 is that of unrelated images."""
    before, after = pair.before.retain_latents, pair.after.retain_latents
    if before is None or after is None:
        return Unknown("there are no images of other prompts")
    return drift_of(before, after)


def drift_of(before: Tensor, after: Tensor) -> Value:
    """mean ‖z_u(i) − z_o(i)‖² / mean ‖z_o(i) − z_o(j)‖², i ≠ j, of latents (n, c, h, w) at equal prompts and seeds."""
    if len(before) < 2:
        return Unknown("fewer than two images")
    z = before.double().flatten(1)
    moved = (after.double().flatten(1) - z).square().sum(1)
    apart = 2 * z.var(0).sum()  # the mean of ‖z_i − z_j‖² over all pairs
    if not apart > 0:
        return Unknown("the original model's images do not differ")
    ratios = moved / apart
    mean = Estimate.mean(ratios.numpy())
    return replace(mean, low=max(mean.low or 0.0, 0.0))


IMAGE_DRIFT = Metric("image_drift", "Drift of other images", "lower", "", image_drift, needs="latents")
