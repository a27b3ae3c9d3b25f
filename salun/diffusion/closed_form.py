"""Closed forms: each projection of the text in cross-attention becomes W₀T, where T depends on embeddings alone.

It imports torch inside its functions, since options of methods are in files that import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.progress import Event, Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.model.protocol import DiffusionModel
    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned

WITHOUT = ("selfattn", "noxattn")  # scopes that leave out cross-attention
KEYS, VALUES = ".attn2.to_k.weight", ".attn2.to_v.weight"


def embeddings(task: ErasureTask) -> tuple[Tensor, Tensor, Tensor]:
    """(c, g, r): text embeddings of the forget, anchor and retain prompts, float64 (n, in), (n, in) and (m, in).

    Every token position alike (the papers take the last token of the subject).
    """
    from salun.diffusion.model.protocol import Conditioning

    pairs = Conditioning.cat([task.encode("forget"), task.encode("anchor")])  # of equal length
    c, g = (part.flatten(0, 1).detach().double().cpu() for part in pairs.hidden.chunk(2))
    return c, g, task.encode("retain").hidden.flatten(0, 1).detach().double().cpu()


def projections(task: ErasureTask, kinds: Sequence[str] = (KEYS, VALUES)) -> list[str]:
    """The projections in scope. Raises ConfigError if it has no projection."""
    names = [name for name in task.parameters if name.endswith(tuple(kinds))]
    if not names:
        raise _nothing_to_edit(task.plan)
    return names


def check(plan: Plan, model: DiffusionModel | None) -> None:
    """Raise ConfigError for a scope that has no cross-attention in any model."""
    if plan.scope in WITHOUT:
        raise _nothing_to_edit(plan)


def _nothing_to_edit(plan: Plan) -> ConfigError:
    return ConfigError(
        f"is {plan.scope}, which has no cross-attention for {plan.method.title} to edit",
        option="scope",
        advice="Use {scope} full or xattn",
    )


def edited(task: ErasureTask, names: Sequence[str], edit: Callable[[str], Tensor]) -> Unlearned:
    """Each projection's new weights, by name → T, float64 (in, in)."""
    from salun.diffusion.output import changed_entries, mask_of_changed
    from salun.diffusion.task import Unlearned

    original, weights = task.model.original(), {}
    for i, name in enumerate(names, 1):
        weights[name] = (original[name].double().cpu() @ edit(name)).float().flatten()
        task.progress(Event(Stage.TRAINING, i, len(names)))
    mask = mask_of_changed({name: original[name] for name in task.parameters}, weights)
    return Unlearned(mask, changed_entries(weights, mask))


def stages(plan: Plan) -> list[StageCost]:
    """One step: a closed form, whose cost is a few linear systems."""
    return [StageCost(Stage.TRAINING, 1)]
