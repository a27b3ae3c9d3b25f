"""JiT: the model's output on the forget set is smoothed, with nothing but the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.classification.task import Batch, Task


@dataclass(frozen=True)
class JitOptions(Checked):
    """Options of JiT."""

    jit_sigma: float = option(
        0.5, "JiT: standard deviation σ of the perturbations of normalized images", above=0, maximum=100
    )
    jit_perturbations: int = option(25, "JiT: perturbations N of each image", minimum=1, maximum=10_000)


def jit(task: Task, options: JitOptions) -> None:
    """JiT (Foster et al. 2024, Lipschitz regularization): min_θ E_x,ε ‖f_θ(x) − f_θ(x + ε)‖₂ / ‖ε‖₂ over D_f.

    ε ~ N(0, σ²), N of them for each image and step; f gives logits. It lowers the local Lipschitz constant around the
    images to be forgotten. The paper takes a step for each image, here a step is of a batch, by default of 16 images,
    each of which takes the memory of 1 + N.
    """
    import torch

    from salun.classification.task import forget_batches, minimize

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        n = options.jit_perturbations
        noise = options.jit_sigma * torch.randn((n, *x.shape)).to(x.device)  # seeded for each epoch, as dropout is
        outputs = task.logits(torch.cat([x, (x + noise).flatten(0, 1)]))
        still, moved = outputs[: len(x)], outputs[len(x) :].unflatten(0, (n, len(x)))
        slope: Tensor = (moved - still).norm(dim=2) / noise.flatten(2).norm(dim=2)
        return slope.mean()

    minimize(task, forget_batches(task), loss)
