"""RECE (Gong et al. 2024): UCE, and then again on the embeddings that would bring the concept back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.diffusion.closed_form import edited, embeddings, projections
from salun.diffusion.methods.uce import edit_of
from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.task import ErasureTask, Unlearned


@dataclass(frozen=True)
class ReceOptions(Checked):
    """The options of RECE."""

    rece_rounds: int = option(2, "RECE: rounds after UCE", minimum=1, maximum=100)
    rece_erase: float = option(1.0, "RECE: weight e of the tokens to erase", minimum=0, maximum=1e6)
    rece_preserve: float = option(0.1, "RECE: weight p of the retain prompts' tokens", minimum=0, maximum=1e6)
    rece_lambda: float = option(
        0.1,
        "RECE: weight λ of the current projection, and of the length of the embeddings that it finds",
        above=0,
        maximum=1e6,
    )


def rece(task: ErasureTask, options: ReceOptions) -> Unlearned:
    """RECE: UCE's edit T, then in each round T ← T·T′, T′ UCE's edit of the embeddings c′ that T leaves open.

    See `adversarial`. Everything is computed once for all projections, by T with W = W₀T.

    Raises:
        ConfigError: The scope has no cross-attention.
    """
    names, original = projections(task), task.model.original()
    c, g, r = embeddings(task)
    weights = options.rece_erase, options.rece_preserve, options.rece_lambda
    gram: Tensor = sum((w.T @ w for w in (original[name].double().cpu() for name in names)), c.new_zeros(()))
    edit = edit_of(c, g, r, *weights)
    for _ in range(options.rece_rounds):
        edit = edit @ edit_of(adversarial(c, edit, gram, options.rece_lambda), g, r, *weights)
    return edited(task, names, lambda name: edit)


def adversarial(c: Tensor, edit: Tensor, gram: Tensor, length: float) -> Tensor:
    """RECE: c′ = argmin Σ_W ‖WTc′ − Wc‖² + λ‖c′‖² = (TᵀGT + λI)⁻¹TᵀGc, G = Σ WᵀW over the projections W.

    Args:
        c: The concept's embeddings, float64 (n, in).
        edit: T, float64 (in, in).
        gram: G, float64 (in, in).
        length: λ.
    """
    import torch

    left = edit.T @ gram @ edit + length * torch.eye(len(gram), dtype=torch.float64)
    preimage: Tensor = torch.linalg.solve(left, edit.T @ gram @ c.T).T
    return preimage
