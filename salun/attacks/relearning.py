"""Relearning: suppressed knowledge is relearned faster than knowledge never learned."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from salun.attacks.attack import Attack
from salun.classification.options import UnlearnOptions
from salun.classification.predictions import SplitPredictions, predict
from salun.classification.randomness import generator_of, seed_of
from salun.classification.task import cross_entropy, forget_batches, training_mode
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer
from salun.progress import Event, Stage

KNOWN = 99.0  # percent of the forget set
RATE = 0.1  # of the learning rate that the original was trained at


@dataclass(frozen=True)
class RelearningOptions:
    """steps: at most. lr, momentum: of SGD. seed: of the order of batches."""

    steps: int
    lr: float
    momentum: float
    seed: int


def settings(options: UnlearnOptions) -> RelearningOptions | None:
    """By `relearn`, at a tenth of the original's learning rate."""
    if not options.relearn:
        return None
    assert options.train_lr is not None
    return RelearningOptions(options.relearn, RATE * options.train_lr, options.momentum, options.seed)


def relearn(target: SplitPredictions, options: RelearningOptions) -> dict[str, Any]:
    """Fine-tune a copy of the model on D_f with its labels until it knows 99 % of it.

    Plain SGD over all weights, the same batches for every model of a seed, BatchNorm frozen. Compare the unlearned
    model's curve with Retrain's, which learns D_f for the first time.

    Returns:
        {"relearning": {"curve": [[step, accuracy in percent], …], "steps": how many it took, None where it never did,
        "reason": why it never did}}.
    """
    task = replace(target.task, model=deepcopy(target.task.model), history=[])
    loss, batches = cross_entropy(task), forget_batches(task)
    curve: list[list[float]] = []

    def measure(step: int) -> bool:
        curve.append([step, 100 * float(predict(task, task.split.forget).correct.mean())])
        training_mode(task.model, "frozen")
        return curve[-1][1] >= KNOWN

    def result(steps: int | None, reason: str | None) -> dict[str, Any]:
        return {"relearning": {"curve": curve, "steps": steps, "reason": reason}}

    known, step, epoch = measure(0), 0, 0
    make = partial(torch.optim.SGD, lr=options.lr, momentum=options.momentum)
    devices = [task.device] if task.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        MaskedOptimizer(task.parameters, Mask.full(task.parameters), make, "pack") as optimizer,
    ):
        while not known and step < options.steps:
            generator = generator_of(options.seed, "relearning", epoch)
            torch.manual_seed(seed_of(options.seed, "relearning", epoch, "dropout"))  # for layers that draw themselves
            for batch in batches(epoch, generator):
                optimizer.backward(loss(task.data.pictures(batch.rows), batch, epoch))
                if not optimizer.step():
                    return result(None, "a gradient was not finite")
                step += 1
                known = measure(step)
                task.progress(Event(Stage.RELEARNING, step, options.steps, {"known %": curve[-1][1]}))
                if known or step == options.steps:
                    break
            epoch += 1
    return result(step, None) if known else result(None, f"not within {options.steps} steps")


RELEARNING = Attack("relearning", "Relearning", "arXiv:1911.04933", "classifier", RelearningOptions, settings, relearn)
