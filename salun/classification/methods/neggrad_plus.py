"""NegGrad+: each step descends on the retain set and ascends on the forget set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.classification.task import Batch, Task


@dataclass(frozen=True)
class NegGradOptions(Checked):
    """Options of NegGrad+."""

    neggrad_beta: float = option(
        0.95, "NegGrad+: weight β of the loss on D_r; that on D_f has the weight 1 − β", minimum=0, maximum=1
    )


def neggrad_plus(task: Task, options: NegGradOptions) -> None:
    """NegGrad+ (Kurmanji et al. 2023, baselines): min_θ β·CE(D_r) − (1 − β)·CE(D_f), both means over their samples.

    A step has a batch of each; an epoch passes over D_r, and over D_f as often as that takes. β = 1 is FT, β = 0 is GA.
    CE(D_f) has no upper bound: a small β ruins the model. The paper takes β = 0.95 on small data and 0.9999 on large.
    """
    import torch
    from torch.nn import functional as F

    from salun.classification.task import Batch, forget_batches, minimize, retain_batches

    forget, beta = task.split.forget, options.neggrad_beta

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        forgotten = forget_again_and_again(epoch, generator)
        for retained in retain_batches(task)(epoch, generator):
            each = retained, next(forgotten)
            yield Batch(torch.cat([b.rows for b in each]), torch.cat([b.labels for b in each]), "both")

    def forget_again_and_again(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield from forget_batches(task)(epoch, generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        each = F.cross_entropy(task.logits(x), batch.labels.to(x.device), reduction="none")
        of_forget = torch.isin(batch.rows, forget).to(x.device)
        total: Tensor = beta * each[~of_forget].mean() - (1 - beta) * each[of_forget].mean()
        return total

    minimize(task, batches, loss)
