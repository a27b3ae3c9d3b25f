"""Boundary unlearning: forget samples are relabeled to the nearest class, or to an extra class that is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, NoOptions, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.classification.task import Batch, Task


@dataclass(frozen=True)
class BoundaryShrinkOptions(Checked):
    """Options of BS."""

    epsilon: float = option(0.1, "BS: step ε across the boundary, in pixel values of 0 to 1", minimum=0, maximum=1)


def boundary_shrink(task: Task, options: BoundaryShrinkOptions) -> None:
    """BS (Chen et al. 2023): min_θ CE(f_θ(x), y_nbi) over D_f, y_nbi the nearest class other than the sample's own.

    It is the original's prediction of x′ = x + ε·sign(∇_x CE(f_θo(x), y)), clamped to pixel values of 0 to 1.
    """
    from salun.classification.task import cross_entropy, forget_batches, minimize

    minimize(task, forget_batches(task, nearest_labels(task, options.epsilon)), cross_entropy(task))


def nearest_labels(task: Task, epsilon: float) -> Tensor:
    """y_nbi of each forget row by the model as it is, int64 (|D_f|,); never the row's own label."""
    import torch
    from torch.nn import functional as F

    task.model.eval()
    mean, std = (torch.tensor(task.data.preset[key], device=task.device).view(-1, 1, 1) for key in ("mean", "std"))
    black, white = -mean / std, (1 - mean) / std
    nearest = []
    for rows in task.split.forget.split(256):
        y = task.labels(rows)
        x = task.data.images_of(rows).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(task.logits(x), y, reduction="sum"), x)
        with torch.no_grad():
            moved = x + epsilon / std * gradient.sign()
            across = task.logits(torch.minimum(torch.maximum(moved, black), white))
        nearest.append(across.scatter(1, y[:, None], float("-inf")).argmax(1))
    return torch.cat(nearest)


def boundary_expanding(task: Task, options: NoOptions) -> None:
    """BE (Chen et al. 2023): min_θ CE(f_θ(x), K + 1) over D_f, with an extra class, then pruned.

    The extra class is a row that is added to the model's head and reads the same features; it is not kept.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    from salun.classification.models import head_of
    from salun.classification.task import forget_batches, minimize
    from salun.randomness import generator_of

    head = head_of(task.model, task.classes)
    seen: list[Tensor] = []
    device = head.weight.device
    generator = generator_of(task.options.seed, "extra class")
    bound = (6 / (head.in_features + 1)) ** 0.5  # Glorot & Bengio's uniform start
    row = nn.Parameter(((torch.rand(1, head.in_features, generator=generator) * 2 - 1) * bound).to(device))
    bias = nn.Parameter(torch.zeros(1, device=device))

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        seen.clear()
        logits = task.logits(x)
        widened = torch.cat([logits, F.linear(seen[0].float(), row, bias)], 1)
        return F.cross_entropy(widened, torch.full_like(batch.labels, task.classes).to(x.device))

    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        minimize(task, forget_batches(task), loss, extra={"extra.weight": row, "extra.bias": bias})
    finally:
        hook.remove()
