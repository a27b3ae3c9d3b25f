"""How soon a model knows the forget set again: what was only hidden comes back sooner than what was never learnt."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from salun.classification.metrics import predict
from salun.classification.task import Task, cross_entropy, forget_batches, minimise
from salun.errors import TrainingError
from salun.masking.mask import Mask
from salun.progress import Event, Stage, silent

KNOWN = 99.0  # percent of the forget set
FRACTION = 0.1  # of the rate that the original was trained at


def relearn(task: Task) -> dict[str, Any]:
    """Fine-tune a copy of the task's model on D_f with its own labels: {"curve": [[step, accuracy in percent], …],
    "steps": how many it took to know 99 % of D_f, None if not within `relearn` of them, "reason": None or why}.

    Plain SGD at a tenth of the original's rate over all weights, the same batches for every model of a seed, BatchNorm
    frozen. Compare the unlearned model's curve with Retrain's, which learns D_f for the first time.
    """
    options = task.options
    assert options.train_lr is not None
    data = replace(task.data, preset={**task.data.preset, "augment": "none"})
    plain = replace(options, weight_decay=0.0)
    copy = replace(task, model=deepcopy(task.model), data=data, options=plain, history=[], progress=silent)
    copy.mask = Mask.full(copy.parameters)
    curve: list[list[float]] = []

    def known(step: int) -> bool:
        curve.append([step, 100 * float(predict(copy, copy.split.forget).correct.mean())])
        return curve[-1][1] >= KNOWN

    def stop(step: int) -> bool:
        ended = known(step)
        task.progress(Event(Stage.RELEARNING, step, options.relearn, {"known %": curve[-1][1]}))
        return ended or step == options.relearn

    if not known(0):
        epochs = -(-options.relearn // max(len(copy.split.forget) // copy.size, 1))
        rate = FRACTION * options.train_lr
        try:
            minimise(copy, forget_batches(copy), cross_entropy(copy), epochs=epochs, lr=rate, batchnorm="frozen",
                     stage=Stage.RELEARNING, stop=stop)  # fmt: skip
        except TrainingError as error:
            return {"curve": curve, "steps": None, "reason": str(error)}
    if curve[-1][1] < KNOWN:
        return {"curve": curve, "steps": None, "reason": f"not within {options.relearn} steps"}
    return {"curve": curve, "steps": curve[-1][0], "reason": None}
