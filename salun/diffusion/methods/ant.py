"""ANT (Li et al. 2025): negative guidance in late denoising steps only; early ones, which lay out the image, stay."""

from __future__ import annotations

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
from salun.options import option
from salun.progress import StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned

TURN = 7  # of 50 sampling steps: from this one on the model is led away


@dataclass(frozen=True)
class AntOptions(NegativeGuidance):
    """The options of ANT."""

    ant_early: float = option(1.0, "ANT: weight α₁ of early denoising steps, which are kept", minimum=0, maximum=1e6)
    ant_empty: float = option(0.5, "ANT: weight α₂ of the empty prompt, which is kept", minimum=0, maximum=1e6)


def ant(task: ErasureTask, options: AntOptions) -> Unlearned:
    """ANT: MSE(ε_θ(x_t, c), ε_θ₀(x_t, ∅) ∓ η·(ε_θ₀(x_t, c) − ε_θ₀(x_t, ∅))) + α₂·MSE(ε_θ(x_t, ∅), ε_θ₀(x_t, ∅)).

    Minus in late denoising steps, plus in the first 7 of 50, which are weighted by α₁; x_t is sampled by the model in
    training. Trains a saliency mask by default: SalUn's, where the paper finds its own by this loss. (In the authors'
    code the empty prompt's loss has no gradient.)
    """
    from torch.nn import functional as F

    from salun.diffusion.task import Unlearned

    model, forget = task.model, task.encode("forget")

    def losses(step: int) -> dict[str, Tensor]:
        generator = task.generator(step)
        late = partly_denoised(task, forget, generator, (TURN, SAMPLING_STEPS))
        early = partly_denoised(task, forget, generator, (0, TURN))
        known = [original_predictions(task, sample) for sample in (late, early)]  # before any pass that is trained
        made = {}
        for name, sample, predictions, sign in (("late", late, known[0], 1), ("early", early, known[1], -1)):
            target = negatively_guided(*predictions, sign * options.negative_guidance)
            made[name] = F.mse_loss(model.predict(sample.x_t, sample.t, sample.prompts), target)
            made[f"{name} empty"] = F.mse_loss(model.predict(sample.x_t, sample.t, sample.empty), predictions[1])
        return {
            "late": made["late"],
            "early": made["early"],
            "empty": made["late empty"] + options.ant_early * made["early empty"],
        }

    trained = task.train(losses, {"early": options.ant_early, "empty": options.ant_empty})
    return Unlearned(task.mask, trained.masters, trained.history)


def stages(plan: Plan) -> list[StageCost]:
    """A late and an early sampling, each with two frozen predictions and two trained ones, for each sample."""
    return training_cost(plan, [(TURN, SAMPLING_STEPS), (0, TURN)], 4, trained=4)
