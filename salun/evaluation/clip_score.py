"""CLIP score: does an image show what its prompt says?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from salun.evaluation.clip_model import ClipModel
from salun.evaluation.estimate import Estimate, Z
from salun.evaluation.sets import SetMetric
from salun.progress import Progress, silent


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The score of each image with its text, float64 (n,): max(100 cos, 0).

    Args:
        images, texts: Embeddings of length 1, (n, d).

    Source: Hessel et al. 2021, "CLIPScore", section 3, with 100 in place of 2.5, as usual since torchmetrics.
    """
    cosines: np.ndarray = (images.astype(np.float64) * texts.astype(np.float64)).sum(1)
    return (100 * cosines).clip(min=0)


def clip_score(images: np.ndarray, prompts: Sequence[str], model: ClipModel, progress: Progress = silent) -> SetMetric:
    """The mean score of images with their prompts, with its 95 % interval.

    Args:
        images: uint8 (n, h, w, 3), n > 0.
        prompts: (n,)

    Raises:
        DataError: The model cannot be loaded.
        ValueError: There are no images, or not as many prompts.
    """
    import transformers

    if not len(images) or len(images) != len(prompts):
        raise ValueError(f"a CLIP score needs a prompt for each image, not {len(prompts)} for {len(images)}")
    scores = clip_scores(model.embed_images(images, progress, len(images)), model.embed_texts(prompts))
    mean, n = float(scores.mean()), len(scores)
    half = Z * float(scores.std(ddof=1)) / n**0.5 if n > 1 else None
    interval = (mean - half, mean + half) if half is not None else (None, None)
    return SetMetric(
        Estimate(mean, n, *interval), f"transformers {transformers.__version__}", f"{model.version} ({model.sha256})"
    )
