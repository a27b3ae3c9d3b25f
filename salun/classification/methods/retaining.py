"""Methods that only descend on the retain set, or only ascend on the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, NoOptions, option

if TYPE_CHECKING:
    from salun.classification.task import Task


@dataclass(frozen=True)
class SparseOptions(Checked):
    """Options of ℓ1-sparse."""

    gamma: float = option(5e-4, "l1-sparse: initial weight γ of the ℓ1 norm", minimum=0, maximum=1)


def retrain(task: Task, options: NoOptions) -> None:
    """Retrain, the exact answer: the model before any training, trained on D_r alone as the original was on D_f ∪ D_r.

    BatchNorm's statistics are measured anew and every weight trains, whatever the options say of unlearning.
    """
    from salun.classification.task import train_from_scratch
    from salun.progress import Stage

    train_from_scratch(task, Stage.RETRAINING)


def fine_tune(task: Task, options: NoOptions) -> None:
    """FT (Golatkar et al. 2020; Warnecke et al. 2021): min_θ CE(D_r) from θ_o; D_f is forgotten by neglect."""
    from salun.classification.task import cross_entropy, minimize, retain_batches

    minimize(task, retain_batches(task), cross_entropy(task))


def gradient_ascent(task: Task, options: NoOptions) -> None:
    """GA (Graves et al. 2021; Thudi et al. 2022): θ ← θ + η ∇CE(D_f), here as descent on −CE."""
    from salun.classification.task import cross_entropy, forget_batches, minimize

    loss = cross_entropy(task)
    minimize(task, forget_batches(task), lambda x, batch, epoch: -loss(x, batch, epoch))


def l1_sparse(task: Task, options: SparseOptions) -> None:
    """ℓ1-sparse (Jia et al. 2023, section 4): min_θ CE(D_r) + γ_t ‖θ‖₁, with γ_t falling linearly from γ to 0."""
    from salun.classification.task import cross_entropy, minimize, retain_batches

    epochs, loss = task.options.epochs, cross_entropy(task)
    assert epochs is not None
    gammas = [options.gamma * (1 - epoch / epochs) for epoch in range(epochs)]
    weights = list(task.parameters.values())
    minimize(
        task,
        retain_batches(task),
        lambda x, batch, epoch: loss(x, batch, epoch) + gammas[epoch] * sum(w.abs().sum() for w in weights),
    )
