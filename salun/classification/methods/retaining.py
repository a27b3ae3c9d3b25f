"""Methods that only descend on the retain set, or only ascend on the forget set."""

from __future__ import annotations

from dataclasses import replace

from salun.classification.task import Task, cross_entropy, forget_batches, minimise, retain_batches
from salun.compute.device import pick_dtype
from salun.masking.mask import Mask
from salun.progress import Stage


def retrain(task: Task, stage: Stage = Stage.RETRAINING) -> None:
    """Retrain, the exact answer: the model before any training, trained on D_r alone as the original was on D_f ∪ D_r.

    SGD as the original was trained, by its `train_…` numbers, momentum, weight decay, dtype and seed, the rate falling
    as a cosine. BatchNorm's statistics are measured anew and every weight trains, whatever the options say of
    unlearning. stage: how progress calls it.
    """
    options = task.recipe or task.options
    task.model.load_state_dict(task.fresh().state_dict())
    task.mask = Mask.full(task.parameters)
    own = replace(task, options=options, dtype=pick_dtype(options.dtype, task.device))
    minimise(
        own,
        retain_batches(own, options.train_batch_size),
        cross_entropy(own),
        epochs=options.train_epochs,
        lr=options.train_lr,
        batchnorm="updated",
        cosine=True,
        stage=stage,
    )


def fine_tune(task: Task) -> None:
    """FT (Golatkar et al. 2020; Warnecke et al. 2021): min_θ CE(D_r) from θ_o; D_f is forgotten by neglect."""
    minimise(task, retain_batches(task), cross_entropy(task))


def gradient_ascent(task: Task) -> None:
    """GA (Graves et al. 2021; Thudi et al. 2022): θ ← θ + η ∇CE(D_f), here as descent on −CE."""
    loss = cross_entropy(task)
    minimise(task, forget_batches(task), lambda x, batch, epoch: -loss(x, batch, epoch))


def l1_sparse(task: Task) -> None:
    """ℓ1-sparse (Jia et al. 2023, section 4): min_θ CE(D_r) + γ_t ‖θ‖₁, with γ_t falling linearly from γ to 0."""
    options, loss = task.options, cross_entropy(task)
    assert options.epochs is not None
    gammas = [options.gamma * (1 - epoch / options.epochs) for epoch in range(options.epochs)]
    weights = list(task.parameters.values())
    minimise(
        task,
        retain_batches(task),
        lambda x, batch, epoch: loss(x, batch, epoch) + gammas[epoch] * sum(w.abs().sum() for w in weights),
    )
