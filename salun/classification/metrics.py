"""How well a classifier has forgotten: UA, RA, TA, MIA and its features, gaps to Retrain, ToW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salun.classification.task import Task
from salun.errors import DataError, TrainingError
from salun.evaluation.metrics import Proportion
from salun.randomness import generator_of

COMPARED = ("UA", "RA", "TA", "MIA")
FEATURES = ("confidence", "entropy", "modified_entropy", "correctness", "probability")


@dataclass(frozen=True, eq=False)
class Predicted:
    """A model's predictions of some rows. p: float64 (n, classes), probabilities. y: int64 (n,), the own labels."""

    p: np.ndarray
    y: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each row's likeliest class is its own, bool (n,)."""
        found: np.ndarray = self.p.argmax(1) == self.y
        return found

    def drawn(self, n: int, seed: int) -> Predicted:
        """n of the rows, see `members`."""
        rows = members(len(self.y), n, seed).numpy()
        return Predicted(self.p[rows], self.y[rows])


def members(of: int, n: int, seed: int) -> Tensor:
    """Which n of so many rows an attack is made from (all, if there are fewer), int64: a seeded permutation's first.

    As stored, rows may be in the order of classes.
    """
    return torch.randperm(of, generator=generator_of(seed, "members"))[:n]


@torch.no_grad()
def predict(task: Task, rows: Tensor, model: nn.Module | None = None) -> Predicted:
    """Predictions of the task's model, or another, in eval mode. Raises TrainingError if they are not finite."""
    (model or task.model).eval()
    parts = [task.logits(task.data.pictures(some), model).double().softmax(1).cpu() for some in rows.split(512)]
    p = torch.cat(parts) if parts else torch.zeros(0, task.classes, dtype=torch.float64)
    if not torch.isfinite(p).all():
        raise TrainingError(
            "the model diverged: its predictions are not finite",
            advice="use a smaller {lr} (FF: {noise}, IU: {influence})",
        )
    return Predicted(p.numpy(), task.labels(rows).cpu().numpy())


def features(predicted: Predicted) -> dict[str, np.ndarray]:
    """What an attack may look at, each (n, d).

    confidence: p_y. entropy: −Σ p log p. modified_entropy: −(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i) (Song & Mittal
    2021), which is 0 for a sure and right answer and infinite for a sure and wrong one. correctness: 1 or 0.
    probability: all of p.
    """
    p, own = predicted.p, np.arange(len(predicted.p))
    p_y = p[own, predicted.y]
    log, log_not = np.log(p.clip(1e-30)), np.log((1 - p).clip(1e-30))
    others = p * log_not
    others[own, predicted.y] = 0
    found = {
        "confidence": p_y,
        "entropy": -(p * log).sum(1),
        "modified_entropy": -(1 - p_y) * log[own, predicted.y] - others.sum(1),
        "correctness": predicted.correct.astype(np.float64),
        "probability": p,
    }
    return {name: values.reshape(len(p), -1) for name, values in found.items()}


def called_non_member(members: np.ndarray, others: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """Whether an SVC (RBF, C = 3, gamma auto) told to keep members from others calls each forgotten row no member.

    Each (n, d), features of rows the model was trained on, of rows it was not, and of D_f. Raises DataError without
    scikit-learn.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise DataError("the MIA needs scikit-learn: pip install salun[classification]") from error
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([members, others]), np.r_[np.ones(len(members)), np.zeros(len(others))])
    found: np.ndarray = attack.predict(forgotten) == 0
    return found


def judge(task: Task) -> dict[str, Any]:
    """UA, RA, TA and MIA of the task's model as it is, in percent with their counts and intervals.

    UA: 1 − accuracy on D_f. RA: accuracy on D_r. TA: accuracy on the test rows of classes that D_r still has. MIA: the
    share of D_f called non-member by an attack on the true label's confidence, made from the test rows and as many rows
    of D_r, which the seed draws (all, if there are fewer). The authors take the first ones of D_r; where a data set is
    stored class by class, those are of a few classes only. mia_features: the same from each feature by itself.
    """
    split, tested = task.split, task.split.kept_test(task.data.labels)
    if not len(split.forget) or not len(tested):
        raise DataError("nothing can be judged: the forget set or the test set is empty")
    forget, retain, test = predict(task, split.forget), predict(task, split.retain), predict(task, tested)
    known = retain.drawn(len(tested), task.options.seed)
    member, other, target = features(known), features(test), features(forget)
    attacks = {
        name: Proportion.of(called_non_member(member[name], other[name], target[name])).json() for name in FEATURES
    }
    return {
        "UA": Proportion.of(~forget.correct).json(),
        "RA": Proportion.of(retain.correct).json(),
        "TA": Proportion.of(test.correct).json(),
        "MIA": attacks["confidence"],
        "mia_features": attacks,
        "confusion": {"forget": confusion(forget), "test": confusion(test)},
    }


def gap_to_retrain(ours: Mapping[str, Any], retrain: Mapping[str, Any]) -> dict[str, Any]:
    """gap: |ours − Retrain's| of each of UA, RA, TA, MIA, in points; gap_mean: their mean; ToW.

    ToW (Zhao et al. 2024, "tug of war"): Π_s (1 − |acc_s − Retrain's acc_s|) over D_f, D_r and test, 1 at best.
    """
    gap = {name: abs(ours[name]["value"] - retrain[name]["value"]) for name in COMPARED}
    tow = prod(1 - gap[name] / 100 for name in ("UA", "RA", "TA"))
    return {"gap": gap, "gap_mean": sum(gap.values()) / len(gap), "ToW": tow}


def accuracies(task: Task) -> dict[str, Any]:
    """Accuracy on the training, validation and test rows, None where there are no rows, and each part's confusion."""
    parts = {"train": task.split.train, "validation": task.split.validation, "test": task.split.test}
    found = {name: predict(task, rows) if len(rows) else None for name, rows in parts.items()}
    told: dict[str, Any] = {
        name: Proportion.of(p.correct).json() if p is not None else None for name, p in found.items()
    }
    return {**told, "confusion": {name: confusion(p) for name, p in found.items() if p is not None}}


def confusion(predicted: Predicted) -> list[list[int]]:
    """Counts by true class (outer) and predicted class (inner)."""
    n = predicted.p.shape[1]
    table = np.zeros((n, n), np.int64)
    np.add.at(table, (predicted.y, predicted.p.argmax(1)), 1)
    found: list[list[int]] = table.tolist()
    return found
