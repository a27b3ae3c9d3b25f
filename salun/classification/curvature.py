"""The curvature of the loss: Fisher information and influence, from gradients of single samples in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from salun.classification.task import Task
from salun.progress import Event, Stage
from salun.randomness import generator_of

_ENTRIES = 1 << 25  # gradient entries held at once while they are summed: 128 MB
_HELD = 1 << 30  # gradient entries that IU keeps: 4 GB


def influence(task: Task, gradients: int, damping: float) -> Tensor:
    """H⁻¹ Σ_i (1/N − w_i) ∇ℓ_i(θ_o), float32 (weights,), with w_i = [i ∈ D_r]/|D_r|.

    H ≈ λI + (1/m) Σ_j g_j g_jᵀ over m single gradients of D_r (WoodFisher, Singh & Alistarh 2020), inverted exactly by
    Woodbury's identity, (1/λ)(v − Gᵀ(λm·I + GGᵀ)⁻¹Gv), with G (m, weights) the g_j as rows. G is held once.

    Args:
        gradients: m, or fewer where 4 GB do not hold as many.
        damping: λ.
    """
    split = task.split
    n, r = len(split.train), len(split.retain)
    forget, retain = gradient_sum(task, split.forget), gradient_sum(task, split.retain)
    v = torch.cat([(forget[k] / n + (1 / n - 1 / r) * retain[k]).flatten() for k in forget])
    wanted = min(gradients, r)
    m = min(wanted, max(_HELD // len(v), 1))
    if m < wanted:
        task.notes.append(
            f"IU took {m} of {wanted} gradients: as many of {len(v):,} weights as {4 * _HELD >> 30} GB hold"
        )
    drawn = split.retain[torch.randperm(r, generator=generator_of(task.options.seed, "gradients"))[:m]]
    held, filled = v.new_empty(m, len(v)), 0
    for part in sample_gradients(task, drawn, "labels"):
        count = len(next(iter(part.values())))
        torch.cat([g.flatten(1) for g in part.values()], 1, out=held[filled : filled + count])
        filled += count
    return inverse_fisher_product(held, v, damping)


def inverse_fisher_product(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    """(λI + GᵀG/m)⁻¹ v for G (m, weights) and v (weights,), by Woodbury's identity."""
    m = len(gradients)
    small = gradients @ gradients.T + damping * m * torch.eye(m, device=v.device, dtype=v.dtype)
    product: Tensor = (v - gradients.T @ torch.linalg.solve(small, gradients @ v)) / damping
    return product


def once(task: Task, name: str, compute: Callable[[], Any]) -> Any:
    """What is computed of θ_o alone: once for all trials of a search."""
    if name not in task.memo:
        task.memo[name] = compute()
    return task.memo[name]


def squared_gradients(task: Task, rows: Tensor, targets: Literal["labels", "model"]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: the mean over rows of Σ_y w_y (∂ log p(y|x)/∂θ)², by name.

    w: all on the true label, or the model's p(y|x).
    """
    sums = {name: torch.zeros_like(p) for name, p in task.parameters.items()}
    for part in sample_gradients(task, rows, targets):
        for name, gradient in part.items():
            sums[name] += gradient.square().sum(0)
    return {name: total / len(rows) for name, total in sums.items()}


def absolute_gradients(task: Task, rows: Tensor) -> dict[str, Tensor]:
    """The mean over rows of |∂‖f_θ(x)‖₂²/∂θ|, f the logits, by name."""
    sums = {name: torch.zeros_like(p) for name, p in task.parameters.items()}
    for part in sample_gradients(task, rows, "output"):
        for name, gradient in part.items():
            sums[name] += gradient.abs().sum(0)
    return {name: total / len(rows) for name, total in sums.items()}


def sample_gradients(
    task: Task, rows: Tensor, targets: Literal["labels", "model", "output"]
) -> Iterator[dict[str, Tensor]]:
    """√w_y · ∂ log p(y|x)/∂θ of single samples, (b, …) by name, a chunk at a time; every class for "model".

    For "output" ∂‖f_θ(x)‖₂²/∂θ instead, f the logits.
    """
    model, names = task.model.eval(), task.parameters
    held = {name: p.detach() for name, p in names.items()}
    buffers = dict(model.named_buffers())

    def likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, {**weights, **buffers}, (x[None],))
        return logits.float().log_softmax(1)[0].gather(0, y[None])[0]

    def length(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, {**weights, **buffers}, (x[None],))
        return logits.float().square().sum()

    measure = length if targets == "output" else likelihood
    each: Callable[..., dict[str, Tensor]] = vmap(grad(measure), in_dims=(None, 0, 0))
    times = task.classes if targets == "model" else 1
    chunk = max(_ENTRIES // (sum(p.numel() for p in held.values()) * times), 1)
    for i, part in enumerate(rows.split(chunk)):
        x, y, weights = task.data.images_of(part), task.labels(part), None
        if targets == "model":
            with torch.no_grad():
                weights = model(x).float().softmax(1).flatten().sqrt()
            x = x.repeat_interleave(times, 0)
            y = torch.arange(times, device=x.device).repeat(len(part))
        gradients = each(held, x, y)
        if weights is not None:
            gradients = {name: g * weights.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
        task.progress(Event(Stage.CURVATURE, i + 1, -(-len(rows) // chunk)))
        yield gradients


def gradient_sum(task: Task, rows: Tensor) -> dict[str, Tensor]:
    """Σ_i ∇ℓ_i over rows, ℓ the cross-entropy, by name."""
    task.model.eval()
    sums = {name: torch.zeros_like(p) for name, p in task.parameters.items()}
    for batch in rows.split(256):
        loss = F.cross_entropy(task.logits(task.data.images_of(batch)), task.labels(batch), reduction="sum")
        for total, gradient in zip(
            sums.values(), torch.autograd.grad(loss, list(task.parameters.values())), strict=True
        ):
            total += gradient
    return sums
