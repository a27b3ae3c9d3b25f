"""Forget-Me-Not (Zhang et al. 2023): the concept's tokens lose the attention of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.options import NoOptions
from salun.progress import Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.model.protocol import DiffusionModel
    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned


def fmn(task: ErasureTask, options: NoOptions) -> Unlearned:
    """FMN, attention re-steering (eq. 3): min Σ_l ‖a_l[n]‖², n the concept's tokens in the prompt of x_t.

    a_l: attention probabilities of cross-attention layer l, over all heads and positions of the latent. x_t are noised
    samples of the concept; nothing holds other prompts in place. The authors train either cross-attention or the whole
    UNet (`scope` full, which their published settings name, and which soon ruins a small model). The paper may first
    learn the tokens by textual inversion, and the authors may add the token that ends the prompt; here the tokens are
    those that name the concept. The equation is from descriptions of the paper, not from its text.
    """
    import torch

    from salun.diffusion.model.protocol import TextAttention
    from salun.diffusion.task import Unlearned

    model, data = task.model, task.training_set
    assert isinstance(model, TextAttention)  # checked when the run began
    tokens = concept_tokens(task)

    def losses(step: int) -> dict[str, Tensor]:
        rows, x_0, t, noise = task.drawn(step, data.forget_latents)
        maps = model.attention_maps(model.schedule.add_noise(x_0, noise, t), t, data.forget[rows])
        norms = torch.stack([(each.square().sum((1, 2)) * tokens[rows]).sum() for each in maps])
        return {"attention": norms.sum() / len(rows)}

    trained = task.train(losses)
    return Unlearned(task.mask, trained.masters, trained.history)


def concept_tokens(task: ErasureTask) -> Tensor:
    """Which tokens of each forget sample's prompt name its concept, float32 (n, tokens): 1, or 0.

    Where a conditioning repeats a shorter prompt k times, k in place of 1: the attention to a token is then divided
    among k, whose squares are a k-th of the square of their sum.
    """
    import torch

    from salun.diffusion.attacks.soft_tokens import occurrences, phrases_of
    from salun.diffusion.model.protocol import TextAttention

    model, data, concepts = task.model, task.training_set, task.plan.prompts.concepts
    assert isinstance(model, TextAttention)
    length, each = data.forget.hidden.shape[1], len(data.forget) // len(concepts)
    marked = []
    for i, concept in enumerate(concepts):
        phrases, of_prompts = phrases_of(task.plan, i, model), []
        for prompt in concept.forget:
            positions, own = model.positions(prompt.text)
            row = torch.zeros(own)
            for start, end in occurrences(model.tokens(prompt.text), phrases):
                row[positions[start:end]] = length / own
            of_prompts.append(row.repeat(length // own))
        marked += [of_prompts[row] for row in data.forget_rows[i * each : (i + 1) * each]]
    return torch.stack(marked).to(model.device)


def check(plan: Plan, model: DiffusionModel | None) -> None:
    """Raise ConfigError for a concept that no prompt of it contains, where a model shows its tokens."""
    from salun.diffusion.attacks.soft_tokens import occurrences, phrases_of
    from salun.diffusion.model.protocol import TextAttention

    if not isinstance(model, TextAttention):
        return
    for i, concept in enumerate(plan.prompts.concepts):
        phrases = phrases_of(plan, i, model)
        if not any(occurrences(model.tokens(prompt.text), phrases) for prompt in concept.forget):
            raise ConfigError(
                f"is {plan.concepts[i].name!r}, whose tokens are in none of its prompts, and FMN needs them",
                option="concept",
                advice="Spell it as in its prompts, or use another {method}",
            )


def stages(plan: Plan) -> list[StageCost]:
    """A pass of each sample, which is trained."""
    return [StageCost(Stage.TRAINING, plan.recipe.steps, backward=plan.recipe.steps * plan.recipe.batch_size)]
