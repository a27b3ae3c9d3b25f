"""The mask of a run: from the saliency of the forget set, or a control such as a random mask."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.classification.task import Task
from salun.masking import find
from salun.masking.mask import Mask
from salun.masking.saliency import scores_from_losses, sensitivity_ratio
from salun.progress import in_parts
from salun.randomness import generator_of, seed_of

BATCH = 256  # images of the forget set at a time


def find_mask(task: Task) -> tuple[Mask, dict[str, Any]]:
    """The mask that the options ask for over all of the model's parameters, and its summary for `run.json`.

    Raises MaskError for a density that selects nothing, or gradients that are not finite.
    """
    options, parameters = task.options, task.parameters
    metadata = {"forget": task.split.forgetting, "seed": str(options.seed), "split": task.split.digest}

    def scores() -> Iterator[dict[str, Tensor]]:
        batches = -(-len(task.split.forget) // BATCH)
        ratio = options.mask == "saliency-ratio"
        rows = _as_many_retained(task) if ratio else task.split.retain[:0]
        first, second = in_parts(task.progress, [batches, -(-len(rows) // BATCH)])
        scores = scores_from_losses(parameters, saliency_losses(task), first, batches)
        if ratio:
            scores = sensitivity_ratio(scores, scores_from_losses(parameters, _losses(task, rows), second))
        yield scores

    seed = seed_of(options.seed, "mask")
    result = find.find_mask(parameters, options.mask or "soft", options.density, seed, scores, metadata)
    return result.mask, result.summary()


def layers_of(mask: Mask) -> dict[str, list[int]]:
    """parameter → [selected, total], in module order."""
    return {name: [count, prod(mask.shapes[name])] for name, count in mask.counts().items()}


def saliency_losses(task: Task) -> Iterator[tuple[Tensor, int]]:
    """−CE of the forget set by the original in eval mode, a batch at a time with its size (SalUn, eq. 3)."""
    return ((-loss, n) for loss, n in _losses(task, task.split.forget))


def _losses(task: Task, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    """CE of rows by the original in eval mode, a batch at a time with its size."""
    task.model.eval()
    for part in rows.split(BATCH):
        yield F.cross_entropy(task.logits(task.data.images_of(part)), task.labels(part)), len(part)


def _as_many_retained(task: Task) -> Tensor:
    """Rows of the retain set, drawn once, as many as there are in the forget set, or all if there are fewer."""
    generator = generator_of(task.options.seed, "mask", "retain")
    order = torch.randperm(len(task.split.retain), generator=generator)
    return task.split.retain[order[: len(task.split.forget)].to(task.split.retain.device)]
