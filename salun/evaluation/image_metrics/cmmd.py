"""CMMD: how far apart two sets of images are, by CLIP's embeddings, without assuming Gaussians as FID does."""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate
from salun.evaluation.image_metric import (
    Distance,
    ImageMetricInputs,
    ImageSet,
    ImageValue,
    clip_embeddings,
    too_few,
)
from salun.progress import Progress

SIGMA, SCALE = 10.0, 1000.0  # of the paper, section 4
LEAST = 256  # images on a side: with fewer, most of a small distance is bias
BLOCK = 2048  # rows of each side whose kernel is computed at once


def cmmd(x: np.ndarray, y: np.ndarray, block: int = BLOCK) -> float:
    """Squared maximum mean discrepancy with the kernel exp(−‖x − y‖² / 2σ²), times 1,000.

    The mean over all pairs, those of an image with itself included, as in the authors' code; so it is never negative,
    and two samples of n images of one distribution are about 1,000 (2 / n) (1 − mean kernel) apart: for embeddings
    with a mean cosine of 0.5 this is 10 / n. The paper's numbers are with ViT-L/14 at 336 pixels.

    Args:
        x, y: CLIP's image embeddings of length 1, (n, d) and (m, d).
        block: Rows of each side that are compared at once, which bounds the memory.

    Raises:
        ValueError: A side is empty, or their embeddings have different lengths.

    Source: Jayasumana et al. 2024, "Rethinking FID: Towards a better evaluation metric for image generation", eq. 2–4.
    """
    if not len(x) or not len(y) or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"CMMD needs embeddings of the same length on both sides, not of shapes {x.shape} and {y.shape}"
        )
    x, y = x.astype(np.float64), y.astype(np.float64)
    return SCALE * (_kernel(x, x, block) + _kernel(y, y, block) - 2 * _kernel(x, y, block))


def _kernel(x: np.ndarray, y: np.ndarray, block: int) -> float:
    """The mean of the kernel over all pairs."""
    total = 0.0
    for a in (x[i : i + block] for i in range(0, len(x), block)):
        for b in (y[i : i + block] for i in range(0, len(y), block)):
            squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * (a @ b.T)
            total += float(np.exp(-squares.clip(min=0) / (2 * SIGMA**2)).sum())
    return total / (len(x) * len(y))


def load(inputs: ImageMetricInputs) -> Distance:
    """CMMD of each model from the images in the folder of the argument, or else between the models.

    It is unknown for fewer than `LEAST` images on a side.

    Raises:
        DataError: The CLIP model cannot be loaded, or the folder has no images.
    """
    model = inputs.clip
    model.load()

    def compare(a: ImageSet, b: ImageSet, progress: Progress) -> ImageValue:
        n = min(len(a), len(b))
        value = too_few(n, LEAST, "CMMD needs", "on a side") or Estimate(
            cmmd(clip_embeddings(a, model, progress), clip_embeddings(b, model, progress)), n
        )
        return ImageValue(value, f"salun, {model.implementation}", model.weights)

    return Distance(compare, lambda of, progress: clip_embeddings(of, model, progress), inputs.real, LEAST)
