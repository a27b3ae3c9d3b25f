"""Concept Ablation (Kumari et al. 2023): on images of the anchor, the concept's prediction becomes the anchor's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.options import Checked, option
from salun.progress import Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.model.protocol import DiffusionModel
    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class CaOptions(Checked):
    """The options of Concept Ablation."""

    ca_regularization: float = option(
        1.0, "CA: weight λ of the diffusion loss on the anchor's images", minimum=0, maximum=1e6
    )


def ca(task: ErasureTask, options: CaOptions) -> Unlearned:
    """CA, model-based: MSE(ε_θ(x_t, c_f), sg ε_θ(x_t, c_a)) + λ·MSE(ε_θ(x_t, c_a), ε), x_t of anchor images.

    sg: without a gradient; of the model in training, not of a frozen copy. Trains the keys and values of
    cross-attention, as the paper does for styles and objects.
    """
    from torch.nn import functional as F

    from salun.diffusion.task import Unlearned

    model, data = task.model, task.training_set

    def losses(step: int) -> dict[str, Tensor]:
        rows, x_0, t, noise = task.drawn(step, data.anchor_latents)
        x_t, anchor = model.schedule.add_noise(x_0, noise, t), data.anchor[rows]
        of_anchor = model.predict(x_t, t, anchor)
        return {
            "erase": F.mse_loss(model.predict(x_t, t, data.forget[rows]), of_anchor.detach()),
            "anchor": F.mse_loss(of_anchor, model.schedule.target(x_0, noise, t)),
        }

    trained = task.train(losses, {"anchor": options.ca_regularization})
    return Unlearned(task.mask, trained.masters, trained.history)


def check(plan: Plan, model: DiffusionModel | None) -> None:
    """Raise ConfigError for options that leave out the anchor's samples."""
    if not plan.recipe.anchor_share:
        raise ConfigError(
            "is 0, but CA trains on the anchor's samples", option="anchor_share", advice="Omit {anchor_share}"
        )


def stages(plan: Plan) -> list[StageCost]:
    """Two trained predictions for each sample."""
    return [StageCost(Stage.TRAINING, plan.recipe.steps, backward=2 * plan.recipe.steps * plan.recipe.batch_size)]
