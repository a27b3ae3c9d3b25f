"""A learning rate from the network's own gradient, in place of a table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from salun.compute.processes import ALONE, Processes
from salun.errors import TrainingError
from salun.masking.mask import Mask
from salun.masking.saliency import each_gradient

TIMES = 3.0  # times the rate at which a single sign step would take the loss to 0, were it linear


def first_order_rate(
    parameters: Mapping[str, nn.Parameter],
    mask: Mask,
    losses: Iterable[Tensor],
    scale: float = 1.0,
    processes: Processes = ALONE,
) -> float:
    """`TIMES` · L / ‖m ⊙ ∇L‖₁, the mean over batches of both: what Adam, whose first step is η·sign(∇L), can use.

    To first order such a step lowers L by η·‖∇L‖₁ (Polyak's step size, for signs).

    Args:
        parameters: Every parameter in the mask's scope, by name.
        losses: Of the batches, each a scalar with a graph, drawn one at a time; each at least 0.
        scale: Of the loss in the backward pass, for fp16.
        processes: Each gives the losses of its part of the batches; gradients are averaged, so that all get the rate of
            whole batches.

    Raises:
        TrainingError: A loss or gradient is not finite, or there is nothing to learn.
    """
    norms, found, counts = [], [], mask.counts()

    def add(name: str, gradient: Tensor) -> None:
        if counts.get(name):
            selected = gradient.float() * mask.dense(name).to(gradient.device)
            processes.average([selected])
            norms.append(selected.abs().sum() / scale)

    with each_gradient(parameters, add):
        for loss in losses:
            (loss * scale if scale != 1.0 else loss).backward()
            found.append(loss.detach().float())
    processes.average(found)
    total = sum(map(float, found))
    norm = float(torch.stack([each.cpu() for each in norms]).sum()) if norms else 0.0
    rate = TIMES * total / norm if norm > 0 else 0.0
    if not 0 < rate < float("inf"):
        raise TrainingError(
            "the forget loss gives no learning rate: it is 0 or not finite, as between equal prompts",
            advice="Use another {anchor}, or give {lr}",
        )
    return rate
