"""Bad teacher: on the forget set the model imitates one that knows nothing, on the retain set its former self."""

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
class BadTeacherOptions(Checked):
    """Options of the bad teacher."""

    bt_temperature: float = option(1.0, "Bad teacher: temperature of the distillation", above=0, maximum=1000)
    bt_retain: float = option(0.3, "Bad teacher: fraction of D_r that is trained on", above=0, maximum=1)


def bad_teacher(task: Task, options: BadTeacherOptions) -> None:
    """Bad teacher (Chundawat et al. 2023, eq. 3): min_θ Σ_x (1 − l)·KL(T_s(x) ‖ f_θ(x)) + l·KL(T_d(x) ‖ f_θ(x)).

    l is 1 on D_f and 0 on a part of D_r, drawn by the seed, in mixed batches. T_s is the original; T_d, the incompetent
    teacher, has the weights of the model before any training. Probabilities are softened by the temperature.
    """
    from copy import deepcopy

    import torch
    from torch.nn import functional as F

    from salun.classification.task import batches_of, minimize
    from salun.randomness import generator_of

    forget, retain, heat = task.split.forget, task.split.retain, options.bt_temperature
    drawn = torch.randperm(len(retain), generator=generator_of(task.options.seed, "part of the retain set"))
    rows = torch.cat([forget, retain[drawn[: max(round(options.bt_retain * len(retain)), 1)]]])
    competent, incompetent = deepcopy(task.model).eval(), task.fresh().to(task.device).eval()

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches_of(rows, task.labels(rows), task.size, "both", generator)

    def loss(x: Tensor, batch: Batch, epoch: int) -> Tensor:
        forgotten = torch.isin(batch.rows, forget).to(x.device)[:, None]
        with torch.no_grad():
            teacher = torch.where(forgotten, task.logits(x, incompetent), task.logits(x, competent))
        target, student = (teacher / heat).softmax(1), (task.logits(x) / heat).log_softmax(1)
        return F.kl_div(student, target, reduction="batchmean")

    minimize(task, batches, loss)
