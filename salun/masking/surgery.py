"""Gradient surgery: what in one gradient opposes another is taken out of it (Yu et al. 2020, arXiv:2001.06782)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def add_without_conflict(gradients: Mapping[str, Tensor], protected: Mapping[str, Tensor], weight: float) -> None:
    """Add to each gradient the protected one of its name, in place, after taking out what opposes the protected ones.

    With all of them as one vector each, g and h: g ← g − min(0, ⟨g, h⟩) / ‖h‖² · h + w·h. Where ⟨g, h⟩ < 0, g becomes
    orthogonal to h, so that a small step along −g leaves the protected loss as it is; elsewhere it is not changed.

    Args:
        gradients: Name → gradient, flat, of one dtype and device.
        protected: Likewise, of the loss that must not rise. Its tensors are changed too.
        weight: w, of the protected loss.
    """
    shared = [(gradients[name], h) for name, h in protected.items()]
    dot = torch.stack([torch.dot(g, h) for g, h in shared]).sum()
    square = torch.stack([torch.dot(h, h) for _, h in shared]).sum()
    factor = torch.where(square > 0, dot.clamp(max=0) / square, torch.zeros_like(square))
    for g, h in shared:
        g.add_(h.mul_(weight - factor))
