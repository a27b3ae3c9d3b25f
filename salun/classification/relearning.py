"""How soon a model knows the forget set again: what was only hidden comes back sooner than what was never learnt."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from salun.classification.metrics import predict
from salun.classification.randomness import generator_of, seed_of
from salun.classification.task import Task, cross_entropy, forget_batches, training_mode
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer
from salun.progress import Event, Stage

KNOWN = 99.0  # percent of the forget set
SHARE = 0.1  # of the rate that the original was trained at


def relearn(task: Task) -> dict[str, Any]:
    """Fine-tune a copy of the task's model on D_f with its own labels: {"curve": [[step, accuracy in percent], …],
    "steps": how many it took to know 99 % of D_f, None if not within `relearn` of them, "reason": None or why}.

    Plain SGD at a tenth of the original's rate over all weights, the same batches for every model of a seed, BatchNorm
    frozen. Compare the unlearned model's curve with Retrain's, which learns D_f for the first time.
    """
    options = task.options
    assert options.train_lr is not None
    model = deepcopy(task.model)
    own = replace(task, model=model, history=[])
    rate = SHARE * options.train_lr
    loss, batches = cross_entropy(own), forget_batches(own)
    curve: list[list[float]] = []

    def look(step: int) -> bool:
        curve.append([step, 100 * float(predict(own, task.split.forget).correct.mean())])
        training_mode(model, "frozen")
        return curve[-1][1] >= KNOWN

    known, step, epoch = look(0), 0, 0
    make = partial(torch.optim.SGD, lr=rate, momentum=options.momentum)
    devices = [task.device] if task.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        MaskedOptimizer(own.parameters, Mask.full(own.parameters), make, "pack") as optimizer,
    ):
        while not known and step < options.relearn:
            generator = generator_of(options.seed, "relearning", epoch)
            torch.manual_seed(seed_of(options.seed, "relearning", epoch, "dropout"))  # for what draws by itself
            for batch in batches(epoch, generator):
                optimizer.backward(loss(own.data.pictures(batch.rows), batch, epoch))
                if not optimizer.step():
                    return {"curve": curve, "steps": None, "reason": "a gradient stopped being finite"}
                step += 1
                known = look(step)
                task.progress(Event(Stage.RELEARNING, step, options.relearn, {"known %": curve[-1][1]}))
                if known or step == options.relearn:
                    break
            epoch += 1
    reason = None if known else f"not within {options.relearn} steps"
    return {"curve": curve, "steps": step if known else None, "reason": reason}
