"""LECO (p1atdev 2023): ESD's target, learned by a low-rank change of the attention; and iLECO, towards the anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.diffusion.negative_guidance import (
    SAMPLING_STEPS,
    NegativeGuidance,
    negatively_guided,
    original_predictions,
    partly_denoised,
    training_cost,
)
from salun.options import Checked, option
from salun.progress import StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned
    from salun.masking.low_rank import LowRank


@dataclass(frozen=True)
class IlecoOptions(Checked):
    """The options of iLECO."""

    leco_rank: int = option(4, "LECO, iLECO: rank of the change of each weight", minimum=1, maximum=1024)


@dataclass(frozen=True)
class LecoOptions(IlecoOptions, NegativeGuidance):
    """The options of LECO."""


def leco(task: ErasureTask, options: LecoOptions) -> Unlearned:
    """LECO: ε_θ(x_t, c) ← ε_θ₀(x_t, ∅) − η·(ε_θ₀(x_t, c) − ε_θ₀(x_t, ∅)), θ = θ₀ + BA/r.

    x_t is sampled under c by the model in training, down to a random step. Trains all attention.
    """
    from torch.nn import functional as F

    model, forget = task.model, task.encode("forget")
    change = low_rank(task, options.leco_rank, 1 / options.leco_rank)

    def losses(step: int) -> dict[str, Tensor]:
        change.write()
        generator = task.generator(step)
        sample = partly_denoised(task, forget, generator, (1, SAMPLING_STEPS))
        target = negatively_guided(*original_predictions(task, sample), options.negative_guidance)
        return {"erase": change.lead(F.mse_loss(model.predict(sample.x_t, sample.t, sample.prompts), target))}

    return trained_low_rank(task, change, losses)


def ileco(task: ErasureTask, options: IlecoOptions) -> Unlearned:
    """iLECO: ε_θ(x_t, c_f) ← ε_θ₀(x_t, c_a), θ = θ₀ + BA/r, on partly denoised samples as of `leco`."""
    import torch
    from torch.nn import functional as F

    model, forget, anchor = task.model, task.encode("forget"), task.encode("anchor")
    change = low_rank(task, options.leco_rank, 1 / options.leco_rank)

    def losses(step: int) -> dict[str, Tensor]:
        change.write()
        generator = task.generator(step)
        sample = partly_denoised(task, forget, generator, (1, SAMPLING_STEPS))
        with torch.no_grad(), task.original_weights():
            target = model.predict(sample.x_t, sample.t, anchor[sample.rows])
        return {"erase": change.lead(F.mse_loss(model.predict(sample.x_t, sample.t, sample.prompts), target))}

    return trained_low_rank(task, change, losses)


def low_rank(task: ErasureTask, rank: int, scale: float) -> LowRank:
    """A low-rank change of the weights in scope, which is 0."""
    import torch

    from salun.diffusion.task import FP16_LOSS_SCALE
    from salun.masking.low_rank import LowRank

    loss_scale = FP16_LOSS_SCALE if task.model.dtype == torch.float16 else 1.0
    return LowRank(task.parameters, task.model.original(), rank, scale, task.plan.options.seed, loss_scale)


def trained_low_rank(
    task: ErasureTask,
    change: LowRank,
    losses: Callable[[int], Mapping[str, Tensor]],
    weights: Mapping[str, float] | None = None,
) -> Unlearned:
    """Train a low-rank change, and add it to the weights."""
    from salun.diffusion.output import changed_entries, mask_of_changed
    from salun.diffusion.task import Unlearned

    with change:
        trained = task.train(losses, weights, parameters=change.factors)
    original, changed = task.model.original(), change.weights()
    mask = mask_of_changed({name: original[name] for name in task.parameters}, changed)
    return Unlearned(mask, changed_entries(changed, mask), trained.history)


def stages(plan: Plan) -> list[StageCost]:
    """A sampling and at most two frozen predictions for each sample."""
    return training_cost(plan, [(1, SAMPLING_STEPS)], 2)
