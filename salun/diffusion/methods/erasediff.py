"""EraseDiff (Wu et al. 2024): forgetting as the lower level of a bi-level problem, whose upper level is to retain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option
from salun.progress import Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class EraseDiffOptions(Checked):
    """The options of EraseDiff."""

    erasediff_lambda: float = option(
        0.1, "EraseDiff: weight λ of the forget loss, relative to the retain loss", minimum=0, maximum=1e6
    )


def erasediff(task: ErasureTask, options: EraseDiffOptions) -> Unlearned:
    """EraseDiff: min MSE(ε_θ(x_t, c_r), ε) + λ·(F(θ) − F(φ_K)), F = MSE(ε_θ(x_t, c_f), sg ε_θ(x_t, c_a)).

    φ_K is θ after K steps on F, the lower level. In the authors' code F(φ_K) is a constant to the gradient, so it
    changes no step and is not computed: what remains is SalUn's loss with the
    noise as retain target, the anchor's prediction of the model in training as forget target, and the weight on
    forgetting. Trains all but cross-attention, as the authors do.
    """
    from salun.diffusion.losses import draw, training_losses
    from salun.diffusion.task import Unlearned

    model, recipe = task.model, task.plan.recipe

    def losses(step: int) -> dict[str, Tensor]:
        batch = draw(
            model, task.training_set, recipe.batch_size, recipe.anchor_share, task.plan.options.seed, step
        ).shard(task.processes.rank, task.processes.count)
        forget, retain = training_losses(model, batch, None, "online", "noise")
        return {"forget": forget, "retain": retain}

    trained = task.train(losses, {"forget": options.erasediff_lambda})
    return Unlearned(task.mask, trained.masters, trained.history)


def stages(plan: Plan) -> list[StageCost]:
    """A prediction of the anchor, and of a forget and a retain sample."""
    samples = plan.recipe.steps * plan.recipe.batch_size
    return [StageCost(Stage.TRAINING, plan.recipe.steps, forward=samples, backward=2 * samples)]
