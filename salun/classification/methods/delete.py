"""DELETE: the forget set keeps the original's predictions, except that its own class has no probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor

    from salun.classification.task import Batch, Task


def delete(task: Task, options: NoOptions) -> None:
    """DELETE (Zhou et al. 2025, mask distillation): min_θ KL(softmax(m(z_o)) ‖ p_θ) over D_f, m(z)_y = −∞.

    z_o are the original's logits and y the image's own class. The other classes keep their ratios to one another, which
    relabeling does not supervise. D_r is not used.
    """
    from copy import deepcopy

    import torch
    from torch.nn import functional as F

    from salun.classification.task import forget_batches, minimize

    original = deepcopy(task.model).eval()

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        with torch.no_grad():
            logits = task.logits(x, original)
        target = without_own_class(logits, batch.labels.to(x.device))
        return F.kl_div(task.logits(x).log_softmax(1), target, reduction="batchmean")

    minimize(task, forget_batches(task), loss)


def without_own_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (b, classes) that are 0 for each row's label and in the logits' ratios for the other classes."""
    masked: Tensor = logits.scatter(1, labels[:, None], float("-inf")).softmax(1)
    return masked
