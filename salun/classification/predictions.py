"""Predictions of a classifier, which metrics and attacks are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from salun.classification.task import Task
from salun.errors import DataError, TrainingError
from salun.randomness import generator_of


@dataclass(frozen=True, eq=False)
class Predicted:
    """A model's predictions for some rows. p: float64 (n, classes), probabilities. y: int64 (n,), the true labels."""

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
    """The indices of n members that an attack is fitted to, int64: the first n of a seeded permutation of `of` rows.

    All of them if there are fewer. The permutation matters because rows may be stored in the order of classes.
    """
    return torch.randperm(of, generator=generator_of(seed, "members"))[:n]


@torch.no_grad()
def predict(task: Task, rows: Tensor) -> Predicted:
    """Predictions of the task's model in eval mode. Raises TrainingError if they are not finite."""
    task.model.eval()
    parts = [task.logits(task.data.images_of(part)).double().softmax(1).cpu() for part in rows.split(512)]
    p = torch.cat(parts) if parts else torch.zeros(0, task.classes, dtype=torch.float64)
    if not torch.isfinite(p).all():
        raise TrainingError(
            "the model diverged: its predictions are not finite",
            advice="Use a smaller {lr} (FF: {noise}, IU: {influence})",
        )
    return Predicted(p.numpy(), task.labels(rows).cpu().numpy())


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Predictions of a task's model on D_f, on D_r and on the test rows of retained classes."""

    task: Task
    forget: Predicted
    retain: Predicted
    test: Predicted

    @classmethod
    def of(cls, task: Task) -> SplitPredictions:
        """The predictions of the task's model. Raises DataError if the forget set or the test set is empty."""
        split, tested = task.split, task.split.retained_test_rows(task.data.labels)
        for name, rows in (("forget set", split.forget), ("test set", tested)):
            if not len(rows):
                raise DataError(f"the {name} is empty, so nothing can be evaluated")
        return cls(task, *(predict(task, rows) for rows in (split.forget, split.retain, tested)))
