"""UNSIR: noise on which the model errs most impairs what it knows of a class, and the retain set repairs the rest."""

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

NOISE_RATE = 0.1  # Adam's learning rate for the noise, in normalized pixels


@dataclass(frozen=True)
class UnsirOptions(Checked):
    """Options of UNSIR."""

    unsir_retain: float = option(0.3, "UNSIR: fraction of D_r that impairs and repairs", above=0, maximum=1)
    unsir_lambda: float = option(0.1, "UNSIR: weight λ of the norm of the noise", minimum=0, maximum=1000)
    unsir_noise_steps: int = option(40, "UNSIR: optimization steps of the noise", minimum=0, maximum=100_000)
    unsir_repair: float = option(
        0.5, "UNSIR: learning rate of repairing, as a fraction of that of impairing", above=0, maximum=1
    )


def resolve(options: UnsirOptions, shared: TaskOptions, split: Split) -> UnsirOptions:
    """Raises ConfigError for fewer epochs than UNSIR has phases."""
    check_epochs(shared.epochs)
    return options


def check_epochs(epochs: int | None) -> None:
    """Raises ConfigError for fewer epochs than UNSIR has phases."""
    if epochs is not None and epochs < 2:
        raise ConfigError(
            f"is {epochs}, but UNSIR impairs in its first epoch and repairs in those after it",
            option="epochs",
            advice="Use 2 or more",
        )


def unsir(task: Task, options: UnsirOptions) -> None:
    """UNSIR (Tarun et al. 2021): noise N = argmin_N −CE(f_θo(N), y_f) + λ‖N‖, then impair, then repair.

    The first epoch impairs: CE on a part of D_r, drawn by the seed, and on the noise with its label y_f, at a high
    learning rate. The epochs after it repair: CE on that part of D_r alone, at a lower rate. Each forgotten class has
    as much noise as a retained class has images in that part. The images of D_f are not used. The paper repairs for one
    epoch, of large data sets; the default here is nine.

    Raises ConfigError for fewer than two epochs.
    """
    import torch
    from torch.nn import functional as F

    from salun.classification.task import batches_of, minimize
    from salun.randomness import generator_of

    epochs, retain = task.options.epochs, task.split.retain
    assert epochs is not None
    check_epochs(epochs)
    forgotten, kinds = task.labels(task.split.forget).unique(), task.labels(retain).unique()
    drawn = torch.randperm(len(retain), generator=generator_of(task.options.seed, "part of the retain set"))
    rows = retain[drawn[: max(round(options.unsir_retain * len(retain)), 1)]]
    wrong = forgotten.repeat_interleave(max(round(len(rows) / len(kinds)), 1))
    noise = error_maximizing_noise(task, wrong, options.unsir_lambda, options.unsir_noise_steps)
    at_a_time = -(-len(noise) * task.size // len(rows))  # so that an epoch has all of it, about

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches_of(rows, task.labels(rows), task.size, "retain", generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        labels = batch.labels.to(x.device)
        if epoch == 0:
            chosen = torch.randperm(len(noise))[:at_a_time].to(x.device)  # seeded for each epoch, as dropout is
            x, labels = torch.cat([x, noise[chosen]]), torch.cat([labels, wrong[chosen]])
        return F.cross_entropy(task.logits(x), labels)

    minimize(task, batches, loss, factors=[1.0, *[options.unsir_repair] * (epochs - 1)])


def error_maximizing_noise(task: Task, labels: Tensor, weight: float, steps: int) -> Tensor:
    """argmin_N mean_i [−CE(f_θ(N_i), y_i) + λ‖N_i‖₂] from N ~ N(0, 1) by Adam, for the model in eval mode.

    Args:
        labels: y, int64 (n,).
        weight: λ.

    Returns:
        The noise, float32 (n, c, h, w), in normalized pixels.
    """
    import torch
    from torch.nn import functional as F

    from salun.randomness import generator_of

    task.model.eval()
    generator = generator_of(task.options.seed, "noise")
    noise = torch.randn((len(labels), *task.data.images.shape[1:]), generator=generator).to(task.device)
    optimizer = torch.optim.Adam([noise.requires_grad_(True)], NOISE_RATE)
    for _ in range(steps):
        for part in torch.arange(len(labels)).split(256):
            chosen = noise[part.to(task.device)]
            loss = weight * chosen.flatten(1).norm(dim=1) - F.cross_entropy(
                task.logits(chosen), labels[part.to(task.device)], reduction="none"
            )
            loss.sum().backward(inputs=[noise])
        optimizer.step()
        optimizer.zero_grad()
    return noise.detach()
