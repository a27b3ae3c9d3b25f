"""Methods that read the curvature of the loss and take one step, without training: FF, IU, SSD.

Gradients are of single pictures, with the model in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from salun.classification.task import Task
from salun.errors import ConfigError, TrainingError
from salun.progress import Event, Stage
from salun.randomness import generator_of

_ENTRIES = 1 << 25  # gradient entries held at once while they are summed: 128 MB
_HELD = 1 << 30  # gradient entries that IU keeps: 4 GB


def fisher_forgetting(task: Task) -> None:
    """FF (Golatkar et al. 2020, Fisher forgetting): θ ← θ + α·F^(−1/4)·n, n ~ N(0, 1).

    F is the diagonal of the Fisher information on D_r, with y ~ p_θ(y|x); α the paper's (λσ_h²)^(1/4). Weights that D_r
    does not need get the most noise. `ff_damping` is added to F, so that noise has an end where F has none: 1e-8, as
    in its authors' code, for most of F is far below what other methods dampen with.
    """
    fisher = once(task, "fisher", lambda: squared_gradients(task, task.split.retain, "model"))
    generator = generator_of(task.options.seed, "fisher noise")
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(task.options.noise * (fisher[name] + task.options.ff_damping).pow(-0.25) * noise)


def influence_unlearning(task: Task) -> None:
    """IU (Koh & Liang 2017; as in Jia et al. 2023): θ_u = θ_o + H⁻¹ Σ_i (1/N − w_i) ∇ℓ_i(θ_o), w_i = [i ∈ D_r]/|D_r|.

    H⁻¹ by WoodFisher (Singh & Alistarh 2020): H ≈ λI + (1/m) Σ_j g_j g_jᵀ over m single gradients of D_r, inverted
    exactly by Woodbury's identity, (1/λ)(v − Gᵀ(λm·I + GGᵀ)⁻¹Gv), with G (m, weights) the g_j as rows. As many as
    `gradients` are taken, or as 4 GB hold. `influence` scales the step.
    """
    options = task.options
    step = options.influence * once(task, "influence", lambda: influence(task))
    if not torch.isfinite(step).all():
        raise TrainingError("the influence is not finite: raise --damping")
    with torch.no_grad():
        for parameter, part in zip(
            task.parameters.values(), step.split([p.numel() for p in task.parameters.values()]), strict=True
        ):
            parameter.add_(part.view_as(parameter))


def influence(task: Task) -> Tensor:
    """H⁻¹ Σ_i (1/N − w_i) ∇ℓ_i(θ_o), (weights,). G is held once, and filled as gradients come."""
    split, options = task.split, task.options
    n, r = len(split.train), len(split.retain)
    forget, retain = gradient_sum(task, split.forget), gradient_sum(task, split.retain)
    v = torch.cat([(forget[k] / n + (1 / n - 1 / r) * retain[k]).flatten() for k in forget])
    wanted = min(options.gradients, r)
    m = min(wanted, max(_HELD // len(v), 1))
    if m < wanted:
        task.notes.append(
            f"IU took {m} of {wanted} gradients: as many of {len(v):,} weights as {4 * _HELD >> 30} GB hold"
        )
    drawn = split.retain[torch.randperm(r, generator=generator_of(options.seed, "gradients"))[:m]]
    held, filled = v.new_empty(m, len(v)), 0
    for part in sample_gradients(task, drawn, "labels"):
        some = len(next(iter(part.values())))
        torch.cat([g.flatten(1) for g in part.values()], 1, out=held[filled : filled + some])
        filled += some
    return inverse_fisher_product(held, v, options.damping)


def inverse_fisher_product(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    """(λI + GᵀG/m)⁻¹ v for G (m, weights) and v (weights,), by Woodbury's identity."""
    m = len(gradients)
    small = gradients @ gradients.T + damping * m * torch.eye(m, device=v.device, dtype=v.dtype)
    product: Tensor = (v - gradients.T @ torch.linalg.solve(small, gradients @ v)) / damping
    return product


def check_alpha(alpha: float, forget: int, train: int) -> None:
    """Raises ConfigError for an α of SSD at which no weight is chosen, of so many pictures to forget."""
    most = train / forget
    if alpha >= most:
        raise ConfigError(
            f"--ssd-alpha {alpha:g}: for {forget} of {train} pictures no weight can be more than {most:.2f} times as "
            "important, and nothing would be forgotten: take a smaller one"
        )


def ssd(task: Task) -> None:
    """SSD, selective synaptic dampening (Foster et al. 2024): θ_i ← min(λ·I_D,i / I_f,i, 1)·θ_i where I_f,i > α·I_D,i.

    I is the diagonal of the Fisher information with the own labels, on D_f and on D = D_f ∪ D_r. The paper takes
    α = 10 for smaller forget sets than a tenth; as I_D ≥ I_f·|D_f|/|D|, no weight is chosen where α ≥ |D|/|D_f|, which
    raises ConfigError. Half of that is the default here.
    """
    alpha, lam = task.options.ssd_alpha, task.options.ssd_lambda
    assert alpha is not None
    check_alpha(alpha, len(task.split.forget), len(task.split.train))
    of_forget = once(task, "of D_f", lambda: squared_gradients(task, task.split.forget, "labels"))
    of_all = once(task, "of D", lambda: squared_gradients(task, task.split.train, "labels"))
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            chosen = of_forget[name] > alpha * of_all[name]
            factor = (lam * of_all[name] / of_forget[name]).clamp(max=1)  # 0/0 where nothing is chosen
            parameter.copy_(torch.where(chosen, parameter * factor, parameter))


def once(task: Task, name: str, count: Callable[[], Any]) -> Any:
    """What is counted of θ_o whatever the option that is searched for: kept for the other trials of a search."""
    if name not in task.memo:
        task.memo[name] = count()
    return task.memo[name]


def squared_gradients(task: Task, rows: Tensor, targets: Literal["labels", "model"]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: the mean over rows of Σ_y w_y (∂ log p(y|x)/∂θ)², by name.

    w: all on the own label, or the model's own p(y|x).
    """
    sums = {name: torch.zeros_like(p) for name, p in task.parameters.items()}
    for part in sample_gradients(task, rows, targets):
        for name, gradient in part.items():
            sums[name] += gradient.square().sum(0)
    return {name: total / len(rows) for name, total in sums.items()}


def sample_gradients(task: Task, rows: Tensor, targets: Literal["labels", "model"]) -> Iterator[dict[str, Tensor]]:
    """√w_y · ∂ log p(y|x)/∂θ of single pictures, (b, …) by name, some pictures at a time; every class for "model"."""
    model, names = task.model.eval(), task.parameters
    held = {name: p.detach() for name, p in names.items()}
    buffers = dict(model.named_buffers())

    def likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, {**weights, **buffers}, (x[None],))
        return logits.float().log_softmax(1)[0].gather(0, y[None])[0]

    each: Callable[..., dict[str, Tensor]] = vmap(grad(likelihood), in_dims=(None, 0, 0))
    times = task.classes if targets == "model" else 1
    chunk = max(_ENTRIES // (sum(p.numel() for p in held.values()) * times), 1)
    for i, some in enumerate(rows.split(chunk)):
        x, y, weights = task.data.pictures(some), task.labels(some), None
        if targets == "model":
            with torch.no_grad():
                weights = model(x).float().softmax(1).flatten().sqrt()
            x = x.repeat_interleave(times, 0)
            y = torch.arange(times, device=x.device).repeat(len(some))
        found = each(held, x, y)
        if weights is not None:
            found = {name: g * weights.view(-1, *[1] * (g.dim() - 1)) for name, g in found.items()}
        task.progress(Event(Stage.CURVATURE, i + 1, -(-len(rows) // chunk)))
        yield found


def gradient_sum(task: Task, rows: Tensor) -> dict[str, Tensor]:
    """Σ_i ∇ℓ_i over rows, ℓ the cross-entropy, by name."""
    task.model.eval()
    sums = {name: torch.zeros_like(p) for name, p in task.parameters.items()}
    for some in rows.split(256):
        loss = F.cross_entropy(task.logits(task.data.pictures(some)), task.labels(some), reduction="sum")
        for total, gradient in zip(
            sums.values(), torch.autograd.grad(loss, list(task.parameters.values())), strict=True
        ):
            total += gradient
    return sums
