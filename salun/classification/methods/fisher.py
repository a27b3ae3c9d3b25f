"""Methods that take one step along the curvature of the loss, without training: FF, IU, SSD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun.errors import ConfigError, TrainingError
from salun.options import Checked, option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from salun.classification.options import TaskOptions
    from salun.classification.splits import Split
    from salun.classification.task import Task


@dataclass(frozen=True)
class FisherOptions(Checked):
    """Options of FF."""

    noise: float = option(0.01, "FF: strength α of the noise α·F^(−1/4)", minimum=0, maximum=100)
    ff_damping: float = option(1e-8, "FF: damping added to the Fisher information", above=0, maximum=100)


@dataclass(frozen=True)
class InfluenceOptions(Checked):
    """Options of IU."""

    damping: float = option(1e-2, "IU: damping λ added to the Fisher information", above=0, maximum=100)
    influence: float = option(1.0, "IU: factor of the step along the influence", minimum=0, maximum=1000)
    gradients: int = option(
        512, "IU: gradients of single samples that estimate the Fisher information", minimum=1, maximum=1_000_000
    )


@dataclass(frozen=True)
class SsdOptions(Checked):
    """Options of SSD."""

    ssd_alpha: float | None = option(
        None,
        "SSD: selection threshold α, the importance for D_f relative to D (default: half of the largest possible)",
        minimum=0,
    )
    ssd_lambda: float = option(1.0, "SSD: dampening constant λ", minimum=0)


def fisher_forgetting(task: Task, options: FisherOptions) -> None:
    """FF (Golatkar et al. 2020, Fisher forgetting): θ ← θ + α·F^(−1/4)·n, n ~ N(0, 1).

    F is the diagonal of the Fisher information on D_r, with y ~ p_θ(y|x); α the paper's (λσ_h²)^(1/4). Weights that D_r
    does not need get the most noise. `ff_damping` is added to F, so that noise is bounded where F is 0: 1e-8, as in its
    authors' code, for most of F is far below what other methods dampen with.
    """
    import torch

    from salun.classification.curvature import once, squared_gradients
    from salun.randomness import generator_of

    fisher = once(task, "fisher", lambda: squared_gradients(task, task.split.retain, "model"))
    generator = generator_of(task.options.seed, "fisher noise")
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(options.noise * (fisher[name] + options.ff_damping).pow(-0.25) * noise)


def influence_unlearning(task: Task, options: InfluenceOptions) -> None:
    """IU (Koh & Liang 2017; as in Jia et al. 2023): θ_u = θ_o + H⁻¹ Σ_i (1/N − w_i) ∇ℓ_i(θ_o), w_i = [i ∈ D_r]/|D_r|.

    H⁻¹ by WoodFisher, see `curvature.influence`; `influence` scales the step.
    """
    import torch

    from salun.classification.curvature import influence, once

    product = once(task, "influence", lambda: influence(task, options.gradients, options.damping))
    step = options.influence * product
    if not torch.isfinite(step).all():
        raise TrainingError("the influence is not finite", advice="Raise {damping}")
    with torch.no_grad():
        for parameter, part in zip(
            task.parameters.values(), step.split([p.numel() for p in task.parameters.values()]), strict=True
        ):
            parameter.add_(part.view_as(parameter))


def resolve_ssd(options: SsdOptions, shared: TaskOptions, split: Split) -> SsdOptions:
    """α = |D|/|D_f|/2 where none is given. Raises ConfigError for an α at which no weight is selected."""
    if not len(split.forget):
        return options
    if options.ssd_alpha is None:
        options = replace(options, ssd_alpha=half_of_largest(split))
    check_alpha(options.ssd_alpha, split)
    return options


def half_of_largest(split: Split) -> float:
    """α = |D|/|D_f|/2."""
    return round(len(split.train) / len(split.forget) / 2, 4)


def check_alpha(alpha: float | None, split: Split, option: str = "ssd_alpha") -> None:
    """Raises ConfigError for an α at which no weight is selected. option: its name."""
    forget, train = len(split.forget), len(split.train)
    if alpha is not None and alpha >= train / forget:
        raise ConfigError(
            f"is {alpha:g}, but for {forget} of {train} samples no weight can be more than "
            f"{train / forget:.2f} times as important, and nothing would be forgotten",
            option=option,
            advice="Use a smaller one",
        )


def ssd(task: Task, options: SsdOptions) -> None:
    """SSD, selective synaptic dampening (Foster et al. 2024): θ_i ← min(λ·I_D,i / I_f,i, 1)·θ_i where I_f,i > α·I_D,i.

    I is the diagonal of the Fisher information with the true labels, on D_f and on D = D_f ∪ D_r. The paper takes
    α = 10 for forget sets smaller than a tenth; as I_D ≥ I_f·|D_f|/|D|, no weight is selected where α ≥ |D|/|D_f|,
    which raises ConfigError. Half of that is the default here.
    """
    from salun.classification.curvature import once, squared_gradients

    alpha = options.ssd_alpha
    assert alpha is not None
    check_alpha(alpha, task.split)
    of_forget = once(task, "of D_f", lambda: squared_gradients(task, task.split.forget, "labels"))
    of_all = once(task, "of D", lambda: squared_gradients(task, task.split.train, "labels"))
    dampen(task, of_forget, of_all, alpha, options.ssd_lambda)


def dampen(
    task: Task, of_forget: Mapping[str, Tensor], of_all: Mapping[str, Tensor], alpha: float, strength: float
) -> None:
    """θ_i ← min(λ·I_D,i / I_f,i, 1)·θ_i where I_f,i > α·I_D,i. strength: λ."""
    import torch

    with torch.no_grad():
        for name, parameter in task.parameters.items():
            selected = of_forget[name] > alpha * of_all[name]
            factor = (strength * of_all[name] / of_forget[name]).clamp(max=1)  # 0/0 where nothing is selected
            parameter.copy_(torch.where(selected, parameter * factor, parameter))
