"""Negative guidance, by which ESD and its kin train: predictions led away from the concept, on partly denoised samples.

It imports torch inside its functions, since options are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option
from salun.progress import Stage, StageCost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.diffusion.model.protocol import Conditioning
    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask

GUIDANCE, SAMPLING_STEPS = 3.0, 50  # of the DDIM sampling of x_t; the numbers of ESD's paper


@dataclass(frozen=True)
class NegativeGuidance(Checked):
    """The option of methods that train by negative guidance."""

    negative_guidance: float = option(1.0, "ESD, LECO, SPM, ANT: negative guidance strength η", minimum=0, maximum=100)


@dataclass(frozen=True)
class Denoised:
    """Samples of forget prompts, denoised down to a random step.

    Args:
        rows: Which of the forget prompts, int64 (n,).
        prompts, empty: Their conditionings, and as many of the empty prompt, (n,) each.
        x_t: float32 (n, c, h, w). t: Timesteps (n,).
    """

    rows: Tensor
    prompts: Conditioning
    empty: Conditioning
    x_t: Tensor
    t: Tensor


def partly_denoised(
    task: ErasureTask,
    forget: Conditioning,
    generator: torch.Generator,
    steps: tuple[int, int] = (0, SAMPLING_STEPS),
    by_original: bool = False,
) -> Denoised:
    """A batch of random forget prompts, sampled down to one random step.

    Args:
        forget: All forget prompts.
        steps: The first step of `SAMPLING_STEPS`, and the one after the last, that the random step may be.
        by_original: Whether the original model samples, rather than the live network.
    """
    import torch

    from salun.diffusion.data.latents import sample_until

    model, n = task.model, task.plan.recipe.batch_size // task.processes.count
    rows = torch.randint(len(forget), (n,), generator=generator).to(model.device)
    prompts, empty = forget[rows], task.empty.expand(n)
    step = int(torch.randint(*steps, (1,), generator=generator))
    with task.original_weights() if by_original else nullcontext():
        x_t, t = sample_until(model, prompts, empty, step, SAMPLING_STEPS, GUIDANCE, generator)
    return Denoised(rows, prompts, empty, x_t, t)


def original_predictions(task: ErasureTask, sample: Denoised) -> tuple[Tensor, Tensor]:
    """(ε_θ₀(x_t, c), ε_θ₀(x_t, ∅)); to be called before the forward pass that is trained."""
    import torch

    with torch.no_grad(), task.original_weights():
        of_concept = task.model.predict(sample.x_t, sample.t, sample.prompts)
        return of_concept, task.model.predict(sample.x_t, sample.t, sample.empty)


def negatively_guided(of_concept: Tensor, of_empty: Tensor, strength: float) -> Tensor:
    """ESD, eq. 6: ε(∅) − η·(ε(c) − ε(∅))."""
    return of_empty - strength * (of_concept - of_empty)


def training_cost(plan: Plan, ranges: Sequence[tuple[int, int]], predictions: int, trained: int = 1) -> list[StageCost]:
    """The one stage of a training.

    Args:
        ranges: `steps` of each sampling of `partly_denoised` in a training step, in which all are equally likely.
        predictions, trained: Passes forward alone, and forward and backward, of each sample.
    """
    denoising = sum(first + end - 1 for first, end in ranges)  # two passes a step, (first + end - 1) / 2 on average
    samples = plan.recipe.steps * plan.recipe.batch_size
    return [StageCost(Stage.TRAINING, plan.recipe.steps, samples * (denoising + predictions), samples * trained)]
