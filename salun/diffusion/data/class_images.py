"""Labeled images that a class-conditional model learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from salun.diffusion.model.class_conditional import VALUES


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The images that a model learns.

    Args:
        images: uint8 (n, c, h, w), of the size of the model.
        labels: int64 (n,).
        classes: Names by label, of all classes.
        digest: A hash of all of it.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    digest: str

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Images of ±1, some of them mirrored, float32 (b, c, h, w)."""
        x = self.images[rows].float() / VALUES - 1
        return torch.where(mirrored[:, None, None, None], x.flip(3), x)
