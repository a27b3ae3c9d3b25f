"""Predictions of a classifier, which metrics and attacks are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from salun.classification.task import Task
from salun.errors import DataError, TrainingError
from salun.randomness import generator_of


@dataclass(frozen=True, eq=False)
class Predicted:
    """A model's predictions of some rows. p: float64 (n, classes), probabilities. y: int64 (n,), the true labels."""

    p: np.ndarray
    y: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each row's likeliest class is the true one, bool (n,)."""
        correct: np.ndarray = self.p.argmax(1) == self.y
        return correct

    def drawn(self, n: int, seed: int) -> Predicted:
        """n of the rows, see `members`."""
        rows = members(len(self.y), n, seed).numpy()
        return Predicted(self.p[rows], self.y[rows])


def members(of: int, n: int, seed: int) -> Tensor:
    """n of so many rows, from which an attack is made (all, if there are fewer), int64: first of a seeded permutation.

    As stored, rows may be in the order of classes.
    """
    return torch.randperm(of, generator=generator_of(seed, "members"))[:n]


@torch.no_grad()
def predict(task: Task, rows: Tensor, model: nn.Module | None = None) -> Predicted:
    """Predictions of the task's model, or another, in eval mode. Raises TrainingError if they are not finite."""
    (model or task.model).eval()
    parts = [task.logits(task.data.pictures(part), model).double().softmax(1).cpu() for part in rows.split(512)]
    p = torch.cat(parts) if parts else torch.zeros(0, task.classes, dtype=torch.float64)
    if not torch.isfinite(p).all():
        raise TrainingError(
            "the model diverged: its predictions are not finite",
            advice="Use a smaller {lr} (FF: {noise}, IU: {influence})",
        )
    return Predicted(p.numpy(), task.labels(rows).cpu().numpy())


class SplitPredictions:
    """Predictions of a task's model on D_f, D_r and the test rows of classes that D_r still has, made when first used.

    Raises DataError if there are no rows to forget or to test.
    """

    def __init__(self, task: Task) -> None:
        self.task, self._tested = task, task.split.retained_test_rows(task.data.labels)
        for name, rows in (("forget set", task.split.forget), ("test set", self._tested)):
            if not len(rows):
                raise DataError(f"the {name} is empty, so nothing can be evaluated")

    @cached_property
    def forget(self) -> Predicted:
        """On D_f."""
        return predict(self.task, self.task.split.forget)

    @cached_property
    def retain(self) -> Predicted:
        """On D_r."""
        return predict(self.task, self.task.split.retain)

    @cached_property
    def test(self) -> Predicted:
        """On the test rows."""
        return predict(self.task, self._tested)
