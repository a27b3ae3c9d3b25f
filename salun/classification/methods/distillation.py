"""A student that leaves its teacher on the forget set and stays with it elsewhere: SCRUB."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.classification.task import Batch, Task, cross_entropy, forget_then_retain, minimise, retain_batches


def scrub(task: Task) -> None:
    """SCRUB (Kurmanji et al. 2023): min_θ α·KL(D_r) + CE(D_r) − KL(D_f), KL from the original's predictions.

    Max and min steps take turns: an epoch first goes over D_f, as long as it is one of the first `max_epochs`, then
    over D_r. KL(p_o ‖ p_θ) is the mean over a batch.
    """
    teacher = deepcopy(task.model).eval()
    ce, options = cross_entropy(task), task.options
    both, retain = forget_then_retain(task), retain_batches(task)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return (both if epoch < options.max_epochs else retain)(epoch, generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        with torch.no_grad():
            wanted = task.logits(x, teacher).log_softmax(1)
        divergence = F.kl_div(task.logits(x).log_softmax(1), wanted, reduction="batchmean", log_target=True)
        return -divergence if batch.part == "forget" else options.distill * divergence + ce(x, batch, epoch)

    minimise(task, batches, loss)
