"""ESD (Gandikota et al. 2023): the model is trained to be guided away from the concept, by its own predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option
from salun.progress import Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned

GUIDANCE, SAMPLING_STEPS = 3.0, 50  # of x_t, which the model in training samples by DDIM; the paper's numbers


@dataclass(frozen=True)
class EsdOptions(Checked):
    """The options of ESD."""

    negative_guidance: float = option(1.0, "ESD: negative guidance strength η", minimum=0, maximum=100)


def esd(task: ErasureTask, options: EsdOptions) -> Unlearned:
    """ESD, eq. 6: ε_θ(x_t, c) ← ε_θ₀(x_t, ∅) − η·(ε_θ₀(x_t, c) − ε_θ₀(x_t, ∅)).

    x_t comes from the model in training, sampled under c down to a random step. `scope` says what trains: xattn is the
    paper's ESD-x, noxattn its ESD-u.
    """
    import torch
    from torch.nn import functional as F

    from salun.diffusion.data.latents import sample_until
    from salun.diffusion.task import Unlearned
    from salun.randomness import step_generator

    model, seed = task.model, task.plan.options.seed
    batch, forget = task.plan.recipe.batch_size // task.processes.count, task.encode("forget")

    def losses(step: int) -> dict[str, Tensor]:
        generator = step_generator(seed, step * task.processes.count + task.processes.rank)
        prompts = forget[torch.randint(len(forget), (batch,), generator=generator).to(model.device)]
        empty = task.empty.expand(batch)
        step_of = int(torch.randint(SAMPLING_STEPS, (1,), generator=generator))
        x_t, t = sample_until(model, prompts, empty, step_of, SAMPLING_STEPS, GUIDANCE, generator)
        with torch.no_grad(), task.original_weights():
            of_concept, of_empty = model.predict(x_t, t, prompts), model.predict(x_t, t, empty)
        target = of_empty - options.negative_guidance * (of_concept - of_empty)
        return {"erase": F.mse_loss(model.predict(x_t, t, prompts), target)}

    trained = task.train(losses)
    return Unlearned(task.mask, trained.masters, trained.history)


def stages(plan: Plan) -> list[StageCost]:
    """Half of the sampling steps on average, two passes each, and two frozen predictions, for each sample."""
    samples = plan.recipe.steps * plan.recipe.batch_size
    return [StageCost(Stage.TRAINING, plan.recipe.steps, forward=samples * (SAMPLING_STEPS + 2), backward=samples)]
