"""Relearning: suppressed knowledge is relearned faster than knowledge never learned."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from salun.classification.options import TaskOptions
from salun.classification.predictions import SplitPredictions, predict
from salun.classification.task import cross_entropy, forget_batches, minimize
from salun.errors import TrainingError
from salun.masking.mask import Mask
from salun.progress import Event, Stage, silent

KNOWN = 99.0  # percent of the forget set
RATE = 0.1  # fraction of the original's learning rate


@dataclass(frozen=True)
class RelearningOptions:
    """steps: at most. lr, momentum: of SGD. seed: of the order of batches."""

    steps: int
    lr: float
    momentum: float
    seed: int


def settings(options: TaskOptions) -> RelearningOptions | None:
    """The options of the attack if the option `relearn` is set: a tenth of the original's learning rate."""
    if not options.relearn:
        return None
    assert options.train_lr is not None
    return RelearningOptions(options.relearn, RATE * options.train_lr, options.momentum, options.seed)


def relearn(target: SplitPredictions, options: RelearningOptions) -> dict[str, Any]:
    """Fine-tune a copy of the model on D_f with its labels until it knows 99 % of it.

    Plain SGD over all weights, the same batches for every model of a seed, BatchNorm frozen. Compare the unlearned
    model's curve with Retrain's, which learns D_f for the first time.

    Returns:
        {"relearning": {"curve": [[step, accuracy in percent], …], "steps": steps until 99 %, None if not reached,
        "reason": why not}}.
    """
    original = target.task
    data = replace(original.data, preset={**original.data.preset, "augment": "none"})
    plain = replace(original.options, weight_decay=0.0)
    task = replace(original, model=deepcopy(original.model), data=data, options=plain, history=[], progress=silent)
    task.mask = Mask.full(task.parameters)
    curve: list[list[float]] = []

    def known(step: int) -> bool:
        curve.append([step, 100 * float(predict(task, task.split.forget).correct.mean())])
        return curve[-1][1] >= KNOWN

    def stop(step: int) -> bool:
        ended = known(step)
        original.progress(Event(Stage.RELEARNING, step, options.steps, {"known %": curve[-1][1]}))
        return ended or step == options.steps

    def result(steps: float | None, reason: str | None) -> dict[str, Any]:
        return {"relearning": {"curve": curve, "steps": steps, "reason": reason}}

    if not known(0):
        epochs = math.ceil(options.steps / max(len(task.split.forget) // task.size, 1))
        try:
            minimize(
                task,
                forget_batches(task),
                cross_entropy(task),
                epochs=epochs,
                lr=options.lr,
                batchnorm="frozen",
                stage=Stage.RELEARNING,
                stop=stop,
            )
        except TrainingError as error:
            return result(None, str(error))
    if curve[-1][1] < KNOWN:
        return result(None, f"not within {options.steps} steps")
    return result(curve[-1][0], None)
