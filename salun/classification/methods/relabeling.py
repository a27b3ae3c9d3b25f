"""Random labels for the forget set, true labels for the rest: RL, and SalUn, which adds a mask or a proximal step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.classification.task import Batch, Batches, Task


@dataclass(frozen=True)
class RelabelingOptions(Checked):
    """Options of RL, SalUn and SalUn-soft."""

    labels: str = option(
        "other",
        "RL, SalUn: random labels other than a sample's own, or any (as in the authors' code)",
        choices=("other", "any"),
    )
    order: str = option(
        "mixed",
        "RL, SalUn: order of an epoch's batches: mixed; or the forget set's, then the retain set's",
        choices=("forget-first", "mixed"),
    )


def random_labels(task: Task, options: RelabelingOptions) -> None:
    """RL (Golatkar et al. 2020): min_θ CE(D_f with random labels) + CE(D_r), over the task's mask.

    Each epoch draws the labels anew and takes D_f first, then D_r, or both mixed.
    """
    from salun.classification.task import cross_entropy, minimize

    minimize(task, relabeled(task, options), cross_entropy(task))


def salun(task: Task, options: RelabelingOptions) -> None:
    """SalUn (Fan et al. 2024, eqs. 3–5): RL, in which only salient weights move.

    θ_u = m ⊙ (θ_o + Δθ) + (1 − m) ⊙ θ_o with m = 1[|∇_θ CE(D_f)| ≥ γ]; the task carries m. Weights outside are never
    written, by weight decay and momentum neither.
    """
    random_labels(task, options)


def salun_soft(task: Task, options: RelabelingOptions) -> None:
    """SalUn-soft (Fan et al. 2024, appendix B): RL with a proximal ℓ1 step on θ − θ_o in place of the mask.

    After each step the change is soft-thresholded so that a fraction of it becomes 0; the fraction falls to none.
    """
    from salun.classification.task import cross_entropy, minimize

    minimize(task, relabeled(task, options), cross_entropy(task), soft_density=task.options.density)


def relabeled(task: Task, options: RelabelingOptions) -> Batches:
    """Each epoch D_f with labels drawn afresh, and D_r with its true labels, in the options' order."""
    import torch

    from salun.classification.task import batches_of, retain_batches

    forget, retain = task.split.forget, task.split.retain

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        drawn = draw_labels(task.labels(forget), task.classes, options.labels, generator)
        if options.order == "mixed":
            labels = torch.cat([drawn, task.labels(retain)])
            return batches_of(torch.cat([forget, retain]), labels, task.size, "both", generator)
        first = batches_of(forget, drawn, task.size, "forget", generator)
        return chain(first, retain_batches(task)(epoch, generator))

    return batches


def draw_labels(true: Tensor, classes: int, kind: str, generator: torch.Generator) -> Tensor:
    """Random labels like `true`, int64 (b,): of `any` class, or of every class but the true one (`other`)."""
    import torch

    if kind == "any":
        return torch.randint(0, classes, true.shape, generator=generator).to(true.device)
    return (true + torch.randint(1, classes, true.shape, generator=generator).to(true.device)) % classes
