"""SPEED (Li et al. 2025): an edit of cross-attention's values within the null space of what is to be retained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.diffusion.closed_form import VALUES, edited, embeddings, projections
from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.task import ErasureTask, Unlearned

RIDGE = 1e-6  # on the system of the invariants, which repeat each other


@dataclass(frozen=True)
class SpeedOptions(Checked):
    """The options of SPEED."""

    speed_threshold: float = option(
        1e-3,
        "SPEED: how much of the largest a direction of the retain prompts may have to be left free, as a fraction of "
        "their squared singular values",
        minimum=0,
        maximum=1,
    )


def speed(task: ErasureTask, options: SpeedOptions) -> Unlearned:
    """SPEED: W = W₀(I + (g − c)cᵀP·Q·M), the least change that moves c to g and nothing of what is retained.

    See `edit_of`. c and g: embeddings of forget and anchor prompts; P projects onto the null space of the retain
    prompts' embeddings; the empty prompt's stay exactly. Without the paper's choice and augmentation of the retain set.

    Raises:
        ConfigError: The scope has no cross-attention.
    """
    names = projections(task, [VALUES])
    c, g, r = embeddings(task)
    invariant = task.empty.hidden.flatten(0, 1).detach().double().cpu()
    edit = edit_of(c, g, null_space(r, options.speed_threshold), invariant)
    return edited(task, names, lambda name: edit)


def null_space(r: Tensor, threshold: float) -> Tensor:
    """P, float64 (in, in): onto the directions in which embeddings r (m, in) have at most this part of their most."""
    import torch

    values, vectors = torch.linalg.eigh(r.T @ r)
    free: Tensor = vectors[:, values <= threshold * values.max()]
    return free @ free.T


def edit_of(c: Tensor, g: Tensor, projection: Tensor, invariant: Tensor) -> Tensor:
    """T = I + Δ with Δ = argmin ‖Δc − (g − c)‖² + ‖Δ‖² over Δ = ΔP with Δk = 0, float64 (in, in).

    Δ = (g − c)cᵀ·P·(I − MK(KᵀPMK)⁻¹KᵀP)·M, M = (ccᵀP + I)⁻¹: the stationary point of the Lagrangian.

    Args:
        c, g: Embeddings to move and what each becomes, float64 (n, in).
        projection: P, float64 (in, in).
        invariant: The embeddings k that stay exactly, float64 (m, in).
    """
    import torch

    eye = torch.eye(c.shape[1], dtype=torch.float64)
    m: Tensor = torch.linalg.inv(c.T @ c @ projection + eye)
    held = invariant @ projection
    inner = held @ m @ invariant.T
    inner = inner + RIDGE * inner.diagonal().abs().max() * torch.eye(len(inner), dtype=torch.float64)
    q: Tensor = eye - m @ invariant.T @ torch.linalg.solve(inner, held)
    return eye + (g - c).T @ c @ projection @ q @ m
