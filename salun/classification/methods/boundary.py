"""Boundary unlearning (Chen et al. 2023): the forget set is given to the class next door, or to one that goes away."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.classification.models import head_of
from salun.classification.task import Batch, Task, cross_entropy, forget_batches, minimise
from salun.randomness import generator_of


def boundary_shrink(task: Task) -> None:
    """BS (Chen et al. 2023): min_θ CE(f_θ(x), y_nbi) over D_f, y_nbi the nearest class but the own.

    It is what the original takes x′ = x + ε·sign(∇_x CE(f_θo(x), y)) for, ε in pixels of 0 to 1, between which x′ is
    held.
    """
    minimise(task, forget_batches(task, nearest_labels(task)), cross_entropy(task))


def nearest_labels(task: Task) -> Tensor:
    """y_nbi of each forget row by the model as it is, int64 (|D_f|,); never the row's own label."""
    task.model.eval()
    mean, std = (torch.tensor(task.data.preset[key], device=task.device).view(-1, 1, 1) for key in ("mean", "std"))
    black, white = -mean / std, (1 - mean) / std
    found = []
    for rows in task.split.forget.split(256):
        y = task.labels(rows)
        x = task.data.pictures(rows).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(task.logits(x), y, reduction="sum"), x)
        with torch.no_grad():
            moved = x + task.options.epsilon / std * gradient.sign()
            across = task.logits(torch.minimum(torch.maximum(moved, black), white))
        found.append(across.scatter(1, y[:, None], float("-inf")).argmax(1))
    return torch.cat(found)


def boundary_expanding(task: Task) -> None:
    """BE (Chen et al. 2023): min_θ CE(f_θ(x), K + 1) over D_f, with an extra class, then pruned.

    The extra class is a row of the head beside the model's own, which it reads the features of: pruning it is leaving
    it behind.
    """
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
        minimise(task, forget_batches(task), loss, extra={"extra.weight": row, "extra.bias": bias})
    finally:
        hook.remove()
