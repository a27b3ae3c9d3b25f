"""The mask of a run: from the saliency of the forget set, or a control such as a random mask."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from salun.classification.task import Task
from salun.masking import find
from salun.masking.mask import Mask
from salun.masking.saliency import scores_from_losses
from salun.randomness import seed_of

BATCH = 256  # images of the forget set at a time


def find_mask(task: Task) -> tuple[Mask, dict[str, Any]]:
    """The mask that the options ask for over all of the model's parameters, and its summary for `run.json`.

    Raises MaskError for a density that selects nothing, or gradients that are not finite.
    """
    options, parameters = task.options, task.parameters
    metadata = {"forget": task.split.forgetting, "seed": str(options.seed), "split": task.split.digest}

    def scores() -> Iterator[dict[str, Tensor]]:
        batches = -(-len(task.split.forget) // BATCH)
        yield scores_from_losses(parameters, saliency_losses(task), task.progress, batches)

    seed = seed_of(options.seed, "mask")
    result = find.find_mask(parameters, options.mask or "soft", options.density, seed, scores, metadata)
    return result.mask, result.summary()


def layers_of(mask: Mask) -> dict[str, list[int]]:
    """parameter → [selected, total], in module order."""
    return {name: [count, prod(mask.shapes[name])] for name, count in mask.counts().items()}


def saliency_losses(task: Task) -> Iterator[tuple[Tensor, int]]:
    """−CE of the forget set by the original in eval mode, a batch at a time with its size (SalUn, eq. 4)."""
    task.model.eval()
    for rows in task.split.forget.split(BATCH):
        yield -F.cross_entropy(task.logits(task.data.images_of(rows)), task.labels(rows)), len(rows)
