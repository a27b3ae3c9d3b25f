"""SCRUB: a student that departs from its teacher on the forget set and stays close to it on the retain set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.options import Checked, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.classification.options import TaskOptions
    from salun.classification.splits import Split
    from salun.classification.task import Batch, Task


@dataclass(frozen=True)
class ScrubOptions(Checked):
    """Options of SCRUB."""

    distill: float = option(0.5, "SCRUB: weight α of the divergence from the original on D_r", minimum=0, maximum=1000)
    max_epochs: int = option(
        3, "SCRUB: epochs, from the second on, that also raise the divergence on D_f", minimum=0, maximum=100_000
    )


def resolve(options: ScrubOptions, shared: TaskOptions, split: Split) -> ScrubOptions:
    """Raises ConfigError for fewer epochs than SCRUB needs to forget."""
    check_epochs(shared.epochs, options.max_epochs)
    return options


def check_epochs(epochs: int | None, max_epochs: int) -> None:
    """Raises ConfigError for fewer epochs than SCRUB needs to forget."""
    if epochs is not None and epochs < 2 and max_epochs:
        raise ConfigError(
            f"is {epochs}, but SCRUB begins to forget in its second epoch", option="epochs", advice="Use 2 or more"
        )


def scrub(task: Task, options: ScrubOptions) -> None:
    """SCRUB (Kurmanji et al. 2023): min_θ α·KL(D_r) + CE(D_r) − KL(D_f), KL from the original's predictions.

    Min and max steps alternate (algorithm 1): each epoch is a min step, over D_r. A max step, over D_f, comes before
    the min step of `max_epochs` epochs from the second on. The paper has a max step before the first one as well, where
    the student still equals its teacher and KL has no gradient. KL(p_o ‖ p_θ) is the mean over a batch.
    Raises ConfigError for one epoch, which would have no max step.
    """
    from copy import deepcopy

    import torch
    from torch.nn import functional as F

    from salun.classification.task import cross_entropy, forget_then_retain, minimize, retain_batches

    check_epochs(task.options.epochs, options.max_epochs)
    ce, teacher = cross_entropy(task), deepcopy(task.model).eval()
    both, retain = forget_then_retain(task), retain_batches(task)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return (both if 1 <= epoch <= options.max_epochs else retain)(epoch, generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        with torch.no_grad():
            target = task.logits(x, teacher).log_softmax(1)
        divergence = F.kl_div(task.logits(x).log_softmax(1), target, reduction="batchmean", log_target=True)
        return -divergence if batch.part == "forget" else options.distill * divergence + ce(x, batch, epoch)

    minimize(task, batches, loss)
