"""Random labels for the forget set, own labels for the rest: RL, and SalUn, which adds a mask or a proximal step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from salun.classification.task import Batch, Batches, Task, batches_of, cross_entropy, minimise, retain_batches


def random_labels(task: Task) -> None:
    """RL (Golatkar et al. 2020): min_θ CE(D_f with random labels) + CE(D_r), over the task's mask.

    Each epoch draws the labels anew (`labels`: other than a picture's own, or any), and takes D_f first, then D_r
    (`order`: or both mixed).
    """
    minimise(task, relabelled(task), cross_entropy(task))


def salun(task: Task) -> None:
    """SalUn (Fan et al. 2024, eqs. 3–5): RL, in which only salient weights move.

    θ_u = m ⊙ (θ_o + Δθ) + (1 − m) ⊙ θ_o with m = 1[|∇_θ CE(D_f)| ≥ γ]; the task carries m. Weights outside are never
    written, by weight decay and momentum neither.
    """
    random_labels(task)


def salun_soft(task: Task) -> None:
    """SalUn-soft (Fan et al. 2024, appendix B): RL with a proximal ℓ1 step on θ − θ_o in place of the mask.

    After each step the change is soft-thresholded so that a share falls to 0, which shrinks to none at the end.
    """
    minimise(task, relabelled(task), cross_entropy(task), soft_density=task.options.density)


def relabelled(task: Task) -> Batches:
    """Each epoch D_f with labels drawn afresh, and D_r with its own, in the options' order."""
    forget, retain = task.split.forget, task.split.retain

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        drawn = draw_labels(task.labels(forget), task.classes, task.options.labels, generator)
        if task.options.order == "mixed":
            labels = torch.cat([drawn, task.labels(retain)])
            return batches_of(torch.cat([forget, retain]), labels, task.size, "both", generator)
        first = batches_of(forget, drawn, task.size, "forget", generator)
        return chain(first, retain_batches(task)(epoch, generator))

    return batches


def draw_labels(own: Tensor, classes: int, kind: str, generator: torch.Generator) -> Tensor:
    """Random labels like `own`, int64 (b,): of `any` class, or of every class but the own one (`other`)."""
    if kind == "any":
        return torch.randint(0, classes, own.shape, generator=generator).to(own.device)
    return (own + torch.randint(1, classes, own.shape, generator=generator).to(own.device)) % classes
