"""UCE (Gandikota et al. 2024): cross-attention's keys and values edited in closed form, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.options import Checked, option
from salun.progress import Event, Stage, StageCost

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.plan import Plan
    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class UceOptions(Checked):
    """The options of UCE."""

    uce_erase: float = option(1.0, "UCE: weight e of the concept's tokens", minimum=0, maximum=1e6)
    uce_preserve: float = option(1.0, "UCE: weight p of the retain prompts' tokens", minimum=0, maximum=1e6)
    uce_lambda: float = option(0.5, "UCE: weight λ of the original projection", above=0, maximum=1e6)


def uce(task: ErasureTask, options: UceOptions) -> Unlearned:
    """UCE, eq. 7: W = (λW₀ + eΣ W₀g cᵀ + pΣ W₀r rᵀ)(λI + eΣ ccᵀ + pΣ rrᵀ)⁻¹ for every key and value projection.

    c, g, r: text embeddings of the forget, anchor and retain prompts, every token position alike (the paper: the last
    token of the subject).

    Raises:
        ConfigError: The scope has no cross-attention.
    """
    from salun.diffusion.model.protocol import Conditioning
    from salun.diffusion.output import changed_entries, mask_of_changed
    from salun.diffusion.task import Unlearned

    pairs = Conditioning.cat([task.encode("forget"), task.encode("anchor")])  # of equal length
    c, g = (part.flatten(0, 1) for part in pairs.hidden.chunk(2))
    edit = edit_of(c, g, task.encode("retain").hidden.flatten(0, 1), options)
    original = task.model.original()
    names = [name for name in task.parameters if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    if not names:
        raise ConfigError(
            f"is {task.plan.options.scope}, which has no cross-attention for UCE to edit",
            option="scope",
            advice="Use {scope} full or xattn",
        )
    edited = {}
    for i, name in enumerate(names, 1):
        edited[name] = (original[name].double() @ edit).float().flatten()
        task.progress(Event(Stage.TRAINING, i, len(names)))
    mask = mask_of_changed({name: original[name] for name in task.parameters}, edited)
    return Unlearned(mask, changed_entries(edited, mask))


def edit_of(c: Tensor, g: Tensor, r: Tensor, options: UceOptions) -> Tensor:
    """T with W = W₀T for every projection, float64 (in, in): eq. 7 is linear in W₀.

    Args:
        c, g: Embeddings to move and what each becomes, float (n, in).
        r: Embeddings to preserve, float (m, in).
    """
    import torch

    c, g, r = (tensor.detach().double().cpu() for tensor in (c, g, r))
    preserved = options.uce_lambda * torch.eye(c.shape[1], dtype=torch.float64) + options.uce_preserve * r.T @ r
    edit: Tensor = torch.linalg.solve(
        preserved + options.uce_erase * c.T @ c, preserved + options.uce_erase * g.T @ c, left=False
    )
    return edit


def stages(plan: Plan) -> list[StageCost]:
    """One step: a closed form, whose cost is a few linear systems."""
    return [StageCost(Stage.TRAINING, 1)]
