"""How well a classifier has forgotten: UA, RA, TA, MIA and other attacks, gaps to Retrain, ToW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from salun.attacks import ATTACKS
from salun.classification.predictions import Predicted, SplitPredictions, predict
from salun.classification.task import Task
from salun.evaluation.estimate import Estimate
from salun.progress import Event, Stage

COMPARED = ("UA", "RA", "TA", "MIA")


def evaluate_classifier(task: Task, attacks: Sequence[str] = ("mia",)) -> dict[str, Any]:
    """UA, RA and TA of the task's model as it is, and what attacks find, as JSON: percentages with n and intervals.

    UA: 1 − accuracy on D_f. RA: accuracy on D_r. TA: accuracy on the test rows of classes that D_r still has.
    attacks: names in `ATTACKS` that the task's options ask for.
    """
    target = SplitPredictions.of(task)
    metrics: dict[str, Any] = {
        "UA": Estimate.percentage(~target.forget.correct).as_json(),
        "RA": Estimate.percentage(target.retain.correct).as_json(),
        "TA": Estimate.percentage(target.test.correct).as_json(),
        "confusion": {"forget": confusion(target.forget), "test": confusion(target.test)},
    }
    for attack in (ATTACKS["classification"][name] for name in attacks):
        metrics |= attack.call(target, attack.settings_of(task.options))
    return metrics


def gap_to_retrain(unlearned: Mapping[str, Any], retrain: Mapping[str, Any]) -> dict[str, Any]:
    """gap: |unlearned − Retrain| of each of UA, RA, TA, MIA, in percentage points; gap_mean: their mean; ToW.

    ToW (Zhao et al. 2024, "tug of war"): Π_s (1 − |acc_s − Retrain's acc_s|) over D_f, D_r and test, 1 at best.
    """
    gap = {name: abs(unlearned[name]["value"] - retrain[name]["value"]) for name in COMPARED}
    tow = prod(1 - gap[name] / 100 for name in ("UA", "RA", "TA"))
    return {"gap": gap, "gap_mean": sum(gap.values()) / len(gap), "ToW": tow}


def accuracies(task: Task) -> dict[str, Any]:
    """Accuracy on the training, validation and test rows, None where there are no rows, and each part's confusion."""
    parts = {"train": task.split.train, "validation": task.split.validation, "test": task.split.test}
    known, done, total = dict[str, Predicted](), 0, sum(map(len, parts.values()))
    for name, rows in parts.items():
        if len(rows):
            known[name], done = predict(task, rows), done + len(rows)
            task.progress(Event(Stage.EVALUATING, done, total))
    values = {name: Estimate.percentage(p.correct).as_json() for name, p in known.items()}
    return {**dict.fromkeys(parts), **values, "confusion": {name: confusion(p) for name, p in known.items()}}


def confusion(predicted: Predicted) -> list[list[int]]:
    """Counts by true class (outer) and predicted class (inner)."""
    n = predicted.p.shape[1]
    table = np.zeros((n, n), np.int64)
    np.add.at(table, (predicted.y, predicted.p.argmax(1)), 1)
    counts: list[list[int]] = table.tolist()
    return counts
