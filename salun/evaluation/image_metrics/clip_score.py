"""CLIP score: does an image show what its prompt says?"""

from __future__ import annotations

import numpy as np

from salun.evaluation.clip_model import ClipModel
from salun.evaluation.estimate import Estimate
from salun.evaluation.image_metric import ImageMetricInputs, ImageSet, ImageValue, clip_embeddings, too_few
from salun.progress import Progress, silent

LEAST = 8  # images: a mean of fewer says little, and nor does its interval


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The score of each image with its text, float64 (n,): max(100 cos, 0).

    Args:
        images, texts: Embeddings of length 1, (n, d).

    Source: Hessel et al. 2021, "CLIPScore", section 3, with 100 in place of 2.5, as usual since torchmetrics.
    """
    cosines: np.ndarray = (images.astype(np.float64) * texts.astype(np.float64)).sum(1)
    return (100 * cosines).clip(min=0)


def clip_score(images: ImageSet, model: ClipModel, progress: Progress = silent) -> ImageValue:
    """The mean score of images with their prompts, with its 95 % interval; unknown for fewer than `LEAST` images.

    Raises:
        DataError: The model cannot be loaded.
        ValueError: There are not as many prompts as images.
    """
    if len(images) != len(images.prompts):
        raise ValueError(f"a CLIP score needs a prompt for each image, not {len(images.prompts)} for {len(images)}")
    value = too_few(len(images), LEAST, "the CLIP score needs") or Estimate.mean(
        clip_scores(clip_embeddings(images, model, progress), model.embed_texts(images.prompts))
    )
    return ImageValue(value, model.implementation, model.weights)


class ClipScore:
    """The CLIP score of each model's images. model: the CLIP model."""

    needs_original = False

    def __init__(self, model: ClipModel) -> None:
        self.model = model

    def measure(self, before: ImageSet | None, after: ImageSet, progress: Progress = silent) -> dict[str, ImageValue]:
        """As in `ImageMetric`."""
        sides = {"before": before, "after": after}
        return {name: clip_score(of, self.model, progress) for name, of in sides.items() if of is not None}


def load(inputs: ImageMetricInputs) -> ClipScore:
    """The CLIP score. Raises DataError where the CLIP model cannot be loaded."""
    inputs.clip.load()
    return ClipScore(inputs.clip)
