"""SalUn-soft: a soft threshold on the change of the weights, in place of a mask."""

from __future__ import annotations

import torch

from salun.masking.optim import MaskedOptimizer
from salun.masking.threshold import kth_largest


class SoftThreshold:
    """SalUn-soft: after each step the change Δ = θ − θ₀ is soft-thresholded (SalUn, appendix B; a proximal ℓ1 step).

    The threshold is the k-th smallest |Δ| over all parameters, k = (1 − density)·N·(1 − step/total): it is strong at
    first and vanishes at the end. θ₀ stays fixed, and no saliency mask is used (the optimizer's mask is full).
    """

    def __init__(self, optimizer: MaskedOptimizer, density: float) -> None:
        self.optimizer, self.density = optimizer, density
        self.originals = {name: m.clone() for name, m in optimizer.masters.items()}
        self.total = sum(m.numel() for m in self.originals.values())

    @torch.no_grad()
    def __call__(self, step: int, steps: int) -> None:
        """Apply after `step` (1-based) of `steps`."""
        k = int((1 - self.density) * self.total * (1 - step / steps))
        if not k:
            return
        changes = {name: self.optimizer.packed[name].master - start for name, start in self.originals.items()}
        threshold = kth_largest({name: c.abs() for name, c in changes.items()}, self.total - k + 1)
        for name, change in changes.items():
            packed = self.optimizer.packed[name]
            packed.master.copy_(self.originals[name] + change.sign() * (change.abs() - threshold).clamp(min=0))
            packed.scatter(packed.indices())

    def final_density(self) -> float:
        """Fraction of the weights that differ from θ₀ now."""
        moved = sum(int((self.optimizer.masters[n] != start).sum()) for n, start in self.originals.items())
        return moved / self.total
