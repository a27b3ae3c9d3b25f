"""ESD (Gandikota et al. 2023): the model is trained to be guided away from the concept, by its own predictions."""

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


@dataclass(frozen=True)
class EsdOptions(NegativeGuidance):
    """The options of ESD."""

    esd_samples: str = option(
        "training",
        "ESD: which model samples x_t, the one in training (the paper's, 2023) or the original (the authors' of 2025)",
        choices=("training", "original"),
    )


def esd(task: ErasureTask, options: EsdOptions) -> Unlearned:
    """ESD, eq. 6: ε_θ(x_t, c) ← ε_θ₀(x_t, ∅) − η·(ε_θ₀(x_t, c) − ε_θ₀(x_t, ∅)).

    x_t is sampled under c down to a random step. `scope` says what trains: xattn is the paper's ESD-x, xattn-strict its
    keys and values alone, noxattn ESD-u.
    """
    from torch.nn import functional as F

    from salun.diffusion.task import Unlearned

    model, forget = task.model, task.encode("forget")

    def losses(step: int) -> dict[str, Tensor]:
        generator = task.generator(step)
        sample = partly_denoised(task, forget, generator, by_original=options.esd_samples == "original")
        target = negatively_guided(*original_predictions(task, sample), options.negative_guidance)
        return {"erase": F.mse_loss(model.predict(sample.x_t, sample.t, sample.prompts), target)}

    trained = task.train(losses)
    return Unlearned(task.mask, trained.masters, trained.history)


def stages(plan: Plan) -> list[StageCost]:
    """A sampling and two frozen predictions for each sample."""
    return training_cost(plan, [(0, SAMPLING_STEPS)], 2)
