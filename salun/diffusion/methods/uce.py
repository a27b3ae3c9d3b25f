"""UCE (Gandikota et al. 2024): cross-attention's keys and values edited in closed form, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.diffusion.closed_form import edited, embeddings, projections
from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class UceOptions(Checked):
    """The options of UCE."""

    uce_erase: float = option(1.0, "UCE: weight e of the concept's tokens", minimum=0, maximum=1e6)
    uce_preserve: float = option(1.0, "UCE: weight p of the retain prompts' tokens", minimum=0, maximum=1e6)
    uce_lambda: float = option(0.5, "UCE: weight λ of the original projection", above=0, maximum=1e6)


def uce(task: ErasureTask, options: UceOptions) -> Unlearned:
    """UCE, eq. 7: W = (λW₀ + eΣ W₀g cᵀ + pΣ W₀r rᵀ)(λI + eΣ ccᵀ + pΣ rrᵀ)⁻¹ for every key and value projection.

    c, g, r: see `embeddings`.

    Raises:
        ConfigError: The scope has no cross-attention.
    """
    names = projections(task)
    edit = edit_of(*embeddings(task), options.uce_erase, options.uce_preserve, options.uce_lambda)
    return edited(task, names, lambda name: edit)


def edit_of(c: Tensor, g: Tensor, r: Tensor, erase: float, preserve: float, original: float) -> Tensor:
    """T with W = W₀T for every projection, float64 (in, in): eq. 7 is linear in W₀.

    Args:
        c, g: Embeddings to move and what each becomes, float64 (n, in).
        r: Embeddings to preserve, float64 (m, in).
        erase, preserve, original: The weights e, p and λ.
    """
    import torch

    fixed = original * torch.eye(c.shape[1], dtype=torch.float64) + preserve * r.T @ r
    edit: Tensor = torch.linalg.solve(fixed + erase * c.T @ c, fixed + erase * g.T @ c, left=False)
    return edit
