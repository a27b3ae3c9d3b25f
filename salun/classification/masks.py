"""The mask of a run: from the saliency of the forget set, or a control."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from salun.classification.task import Task
from salun.masking.mask import Mask, entries
from salun.masking.saliency import scores_from_losses
from salun.masking.threshold import select_largest
from salun.randomness import seed_of
from salun.version import __version__


def find_mask(task: Task) -> tuple[Mask, dict[str, Any]]:
    """The mask that the options ask for over all of the model's parameters, and what `run.json` says of it.

    Raises MaskError for a density that selects nothing, or gradients that are not finite.
    """
    options, parameters = task.options, task.parameters
    mode = options.mask or "soft"
    told: dict[str, Any] = {"warnings": []}
    if mode in ("full", "soft"):
        mask = Mask.full(parameters)
    elif mode == "random":
        mask = Mask.random(parameters, options.density, seed_of(options.seed, "mask"))
    else:
        scores = scores_from_losses(parameters, saliency_losses(task), task.progress, -(-len(task.split.forget) // 256))
        selection = select_largest(scores, entries(sum(p.numel() for p in parameters.values()), options.density))
        mask = Mask.from_selection(selection, parameters)
        told = {"threshold": selection.threshold, "zeros": selection.zeros, "ties": selection.ties}
        told["warnings"] = selection.warnings()
        if mode == "shuffled":
            mask = mask.shuffled(seed_of(options.seed, "mask"))
    metadata = {"method": mode, "density": str(options.density), "forget": options.forget, "seed": str(options.seed)}
    metadata |= {"split": task.split.digest, "salun_version": __version__}
    mask = Mask(mask.bits, mask.shapes, metadata)
    return mask, {"mode": mode, "density": mask.density, "selected": mask.selected, "total": mask.total, **told}


def layers_of(mask: Mask) -> dict[str, list[int]]:
    """parameter → [selected, total], in module order."""
    return {name: [count, prod(mask.shapes[name])] for name, count in mask.counts().items()}


def saliency_losses(task: Task) -> Iterator[tuple[Tensor, int]]:
    """−CE of the forget set by the original in eval mode, a batch at a time with its size (SalUn, eq. 4)."""
    task.model.eval()
    for rows in task.split.forget.split(256):
        yield -F.cross_entropy(task.logits(task.data.pictures(rows)), task.labels(rows)), len(rows)
