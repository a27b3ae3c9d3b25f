"""A student that leaves its teacher on the forget set and stays with it elsewhere: SCRUB."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.classification.task import Batch, Task, cross_entropy, forget_then_retain, minimise, retain_batches
from salun.errors import ConfigError


def check_epochs(epochs: int | None, max_epochs: int) -> None:
    """Raises ConfigError for fewer epochs than SCRUB forgets in."""
    if epochs is not None and epochs < 2 and max_epochs:
        raise ConfigError(f"--epochs {epochs}: SCRUB begins to forget in its second epoch; take 2 or more")


def scrub(task: Task) -> None:
    """SCRUB (Kurmanji et al. 2023): min_θ α·KL(D_r) + CE(D_r) − KL(D_f), KL from the original's predictions.

    Min and max steps take turns (its algorithm 1): each epoch is a min step, over D_r, and before it the second and
    those after it, `max_epochs` of them, have a max step, over D_f. The paper has a max step before the first one, too,
    where the student still equals its teacher and KL has no gradient. KL(p_o ‖ p_θ) is the mean over a batch.
    Raises ConfigError for one epoch, which would have no max step.
    """
    ce, options = cross_entropy(task), task.options
    check_epochs(options.epochs, options.max_epochs)
    teacher = deepcopy(task.model).eval()
    both, retain = forget_then_retain(task), retain_batches(task)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return (both if 1 <= epoch <= options.max_epochs else retain)(epoch, generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        with torch.no_grad():
            wanted = task.logits(x, teacher).log_softmax(1)
        divergence = F.kl_div(task.logits(x).log_softmax(1), wanted, reduction="batchmean", log_target=True)
        return -divergence if batch.part == "forget" else options.distill * divergence + ce(x, batch, epoch)

    minimise(task, batches, loss)
