"""SPM (Lyu et al. 2024): one-dimensional adapters learn ESD's target, while distant prompts are held in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.diffusion.methods.leco import low_rank, trained_low_rank
from salun.diffusion.negative_guidance import (
    SAMPLING_STEPS,
    NegativeGuidance,
    negatively_guided,
    original_predictions,
    partly_denoised,
    training_cost,
)
from salun.options import option
from salun.progress import StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.model.protocol import Conditioning
    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class SpmOptions(NegativeGuidance):
    """The options of SPM."""

    spm_anchoring: float = option(
        1000.0, "SPM: weight λ of the loss that holds the retain prompts", minimum=0, maximum=1e6
    )


def spm(task: ErasureTask, options: SpmOptions) -> Unlearned:
    """SPM: the loss of `leco` at rank 1 + λ·MSE(ε_θ(x_t, c̃), ε_θ₀(x_t, c̃)), c̃ with probability ∝ 1 − |cos(c̃, c)|.

    c̃ are the retain prompts (the paper: sampled words), compared by the mean of their text embeddings. The paper also
    switches the adapters by the prompt's distance from the concept when images are made ("facilitated transport"),
    which weights of a model cannot; here they are always on.
    """
    import torch
    from torch.nn import functional as F

    model, forget, retain = task.model, task.encode("forget"), task.encode("retain")
    chances = distances(retain, forget)
    change = low_rank(task, 1, 1.0)

    def losses(step: int) -> dict[str, Tensor]:
        change.write()
        generator = task.generator(step)
        sample = partly_denoised(task, forget, generator, (1, SAMPLING_STEPS))
        picked = torch.multinomial(chances, len(sample.x_t), replacement=True, generator=generator)
        held = retain[picked.to(model.device)]
        target = negatively_guided(*original_predictions(task, sample), options.negative_guidance)
        with torch.no_grad(), task.original_weights():
            of_held = model.predict(sample.x_t, sample.t, held)
        erase = change.lead(F.mse_loss(model.predict(sample.x_t, sample.t, sample.prompts), target))
        return {
            "erase": erase,
            "anchoring": change.lead(F.mse_loss(model.predict(sample.x_t, sample.t, held), of_held)),
        }

    return trained_low_rank(task, change, losses, {"anchoring": options.spm_anchoring})


def distances(retain: Conditioning, forget: Conditioning) -> Tensor:
    """1 − |cos| of each retain prompt and the mean forget prompt, float32 (m,) on the CPU; not all of them 0."""
    from torch.nn import functional as F

    means = retain.hidden.float().mean(1)
    return 1e-6 + 1 - F.cosine_similarity(means, forget.hidden.float().mean((0, 1))[None]).abs().clamp(max=1).cpu()


def stages(plan: Plan) -> list[StageCost]:
    """A sampling, three frozen predictions and two trained ones for each sample."""
    return training_cost(plan, [(1, SAMPLING_STEPS)], 3, trained=2)
