"""The search for a method's learning rate (or another option of its strength), without Retrain.

Every method forgets too little at one rate and too much at another. The gap to Retrain would tell which is best, but
unlearning would be pointless if Retrain were needed for it. Retrain's metrics can be predicted, though: it never saw
the forget set, so it behaves on it as the original does on images that it never saw. The validation rows of the split
are such images, used neither in training nor in evaluation. The predicted metrics are

    UA    the original's error on validation images of the same classes as the forget set; 100 % for a class that is
          forgotten completely
    RA    the original's accuracy on D_r
    TA    the original's accuracy on validation images of the retained classes
    MIA   the percentage of validation images (classes as in the forget set) that an attack on the original calls
          non-members, where the attack is fitted to other validation images; 100 % for a completely forgotten class

The search chooses the value whose model is nearest to them: the smallest mean absolute difference, with TA on
validation images. Of equally good values it chooses the smallest, which changes the model least. The prediction ignores
that Retrain, trained on fewer images, generalizes slightly worse.

Values are tried in rounds: a wide grid; up to three values beyond an end of the grid, while the best value is at that
end; and the values halfway (on a logarithmic scale) between the best one and its neighbors. With several seeds, a round
tries the same values at all of them and compares mean scores; a value that diverges at one seed cannot be chosen. The
center of the grid is the method's default, which the same search found.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any, TypeVar

import numpy as np
import torch

from salun.classification.attacks.mia import called_non_member, features
from salun.classification.data import ImageData
from salun.classification.masks import find_mask
from salun.classification.metrics import COMPARED
from salun.classification.options import TaskOptions
from salun.classification.predictions import Predicted, predict
from salun.classification.splits import Split
from salun.classification.task import Task
from salun.errors import ConfigError, TrainingError
from salun.methods import METHODS, Method
from salun.progress import Event, Progress, Stage
from salun.randomness import generator_of

Options = TypeVar("Options", bound=TaskOptions)
FURTHER = 3  # values beyond an end of the grid, where the best lies there


@dataclass(frozen=True)
class Trial:
    """A value that was tried: its score in percentage points and its metrics in percent, or why there are none."""

    value: float
    score: float | None
    figures: dict[str, float] | None = None  # a key of the files: codespell:ignore figures
    reason: str | None = None


def search(task: Task) -> tuple[TaskOptions, dict[str, Any]]:
    """The task's options with the best value, and the search's result for `run.json`. The task is not changed.

    Raises ConfigError for a split without validation rows or a method without an option to search, TrainingError if no
    value gives a model.
    """
    searching = rounds(task.options)
    task, values = replace(task, memo={}), next(searching)
    result: dict[str, Any] = {}
    while values:
        trial_result = trials(task, values, len(result.get("tried", ())))
        result = merged([trial_result], result)
        values = next_round(searching, result)
    if result["chosen"] is None:
        raise TrainingError(
            f"the search failed: training diverges at every {result['option']} ({result['tried'][0]['reason']})"
        )
    return with_value(task.options, result["option"], result["chosen"]), result


def rounds(options: TaskOptions) -> Generator[list[float], list[Trial], None]:
    """Yields the values of each round and is sent all trials so far. Raises ConfigError for a method without an option
    to search.
    """
    method = _tuned(options)
    assert method.tunes is not None
    center = float(getattr(options, method.tunes))
    tried = yield [center * factor for factor in method.factors]
    for _ in range(FURTHER):
        value = extend_grid(tried)
        if value is None:
            break
        tried = yield [value]
    nearby = refine_grid(tried)
    if nearby:
        yield nearby


def check_search(options: TaskOptions, data: ImageData, split: Split) -> None:
    """Raises ConfigError for an impossible search: of a method without an option to search, or with too few validation
    images.
    """
    _tuned(options)
    held_out(data, split)


def _tuned(options: TaskOptions) -> Method:
    method = METHODS["classification"][options.method]
    if method.tunes is None:
        raise ConfigError(
            f"is set, but the method {method.title} has no option to search", option="search", advice="Omit it"
        )
    return method


def next_round(searching: Generator[list[float], list[Trial], None], result: Mapping[str, Any]) -> list[float]:
    """The values of the search's next round, given its merged result so far; none when the search has ended."""
    try:
        return searching.send([Trial(trial["value"], trial["score"]) for trial in result["tried"]])
    except StopIteration:
        return []


def trials(task: Task, values: Sequence[float], before: int = 0) -> dict[str, Any]:
    """The trials of these values with one seed: {"option", "foretold", "untouched", "tried", "seconds"}.

    foretold: the predicted metrics of Retrain. untouched: the score of θ_o itself, which a useful method improves on.
    before: number of trials in earlier rounds, for the progress. Raises ConfigError for a split without validation
    rows.
    """
    method = METHODS["classification"][task.options.method]
    assert method.tunes is not None
    began = time.perf_counter()
    wanted = predicted_retrain(task)
    if method.trains and task.mask is None:
        task = replace(task, mask=find_mask(replace(task, progress=_only_cancel(task)))[0])
    tried = []
    for value in values:
        tried.append(_trial(task, method.tunes, value, wanted))
        shown = {method.tunes: value} | ({} if tried[-1].score is None else {"distance": tried[-1].score})
        task.progress(Event(Stage.SEARCHING, before + len(tried), before + len(values), shown))
    return {
        "option": method.tunes,
        "foretold": wanted,
        "untouched": _off_by(validation_metrics(task), wanted),
        "tried": [asdict(trial) for trial in tried],
        "seconds": round(time.perf_counter() - began, 3),
    }


def merged(results: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Merge trials of the same values at several seeds and those of earlier rounds: the result for `run.json`.
    chosen: the value with the smallest mean score among those that diverged at no seed, None if there is none. remark:
    reasons to doubt the value: it is the lowest or highest one tried, a neighboring value diverges, or θ_o itself is as
    near to the predicted metrics; None without any. runs: number of trainings. If a seed has an "error" instead of
    trials, the search fails.
    """
    before = before or {}
    failed = next((result["error"] for result in results if "error" in result), None)
    if failed is not None:
        return {"option": None, "foretold": None, "untouched": None, "tried": [], "runs": 0, "seconds": 0.0, **before,
                "chosen": None, "remark": f"none: {failed}", "error": failed}  # fmt: skip
    first = results[0]
    tried = [*before.get("tried", ())]
    for at, trial in enumerate(first["tried"]):
        seeds = [result["tried"][at] for result in results]
        scores = [trial["score"] for trial in seeds if trial["score"] is not None]
        good = len(scores) == len(seeds)
        tried.append(
            {
                "value": trial["value"],
                "score": sum(scores) / len(scores) if good else None,
                "figures": _means([trial["figures"] for trial in seeds]) if good else None,
                "reason": next((trial["reason"] for trial in seeds if trial["reason"]), None),
            }
        )
    tried.sort(key=lambda trial: float(trial["value"]))
    untouched = sum(result["untouched"] for result in results) / len(results)
    best = _best([Trial(trial["value"], trial["score"]) for trial in tried])
    return {
        "option": first["option"],
        "chosen": best.value if best else None,
        "remark": _remark(tried, untouched),
        "foretold": {k: sum(result["foretold"][k] for result in results) / len(results) for k in COMPARED},
        "untouched": untouched,
        "tried": tried,
        "runs": before.get("runs", 0) + sum(len(result["tried"]) for result in results),
        "seconds": round(before.get("seconds", 0.0) + sum(result["seconds"] for result in results), 3),
    }


def of_one_seed(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The result of `trials` with one seed from results that have some of its values each; the first error, if any."""
    failed = next((result for result in results if "error" in result), None)
    if failed is not None:
        return failed
    tried = [trial for result in results for trial in result["tried"]]
    return {**results[0], "tried": tried, "seconds": sum(result["seconds"] for result in results)}


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(values[name] for values in metrics) / len(metrics) for name in COMPARED}


def with_value(options: Options, name: str, value: float) -> Options:
    """The options with another value of the one that is searched for. Raises ConfigError if it is out of range."""
    changed: dict[str, Any] = {name: value}
    return replace(options, **changed)


def _trial(task: Task, option: str, value: float, wanted: dict[str, float]) -> Trial:
    try:
        options = with_value(task.options, option, value)
        tried = replace(task, model=deepcopy(task.model), options=options, progress=_only_cancel(task), history=[])
        METHODS["classification"][options.method].call(tried, options)
        metrics = validation_metrics(tried)
    except (TrainingError, ConfigError) as error:
        return Trial(value, None, None, str(error))
    return Trial(value, _off_by(metrics, wanted), metrics)


def _only_cancel(task: Task) -> Progress:
    """A progress that only lets the host cancel."""

    def check(event: Event, /) -> None:
        task.progress(Event(Stage.SEARCHING))

    return check


def _off_by(metrics: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    return sum(abs(metrics[name] - wanted[name]) for name in COMPARED) / len(COMPARED)


def _best(tried: Sequence[Trial]) -> Trial | None:
    scored = [trial for trial in tried if trial.score is not None]
    return min(scored, key=lambda trial: (trial.score, trial.value)) if scored else None


def extend_grid(tried: Sequence[Trial]) -> float | None:
    """The next value beyond the end of the grid where the best value is; below the grid if every value diverges.

    None if the best value is not at an end, or no better than its neighbor.
    """
    tried = sorted(tried, key=lambda trial: trial.value)
    best = _best(tried)
    if len(tried) < 2:
        return None
    if best is None:
        return tried[0].value ** 2 / tried[1].value
    if best.value not in (tried[0].value, tried[-1].value):
        return None
    end, neighbor = (tried[0], tried[1]) if best.value == tried[0].value else (tried[-1], tried[-2])
    return None if neighbor.score == best.score else end.value**2 / neighbor.value


def refine_grid(tried: Sequence[Trial]) -> list[float]:
    """The geometric means of the best value and each neighbor, even a diverged one; empty without a best value."""
    values, best = sorted(trial.value for trial in tried), _best(tried)
    if best is None:
        return []
    at = values.index(best.value)
    return [sqrt(best.value * values[i]) for i in (at - 1, at + 1) if 0 <= i < len(values) and values[i] > 0]


def _remark(tried: Sequence[Mapping[str, Any]], untouched: float) -> str | None:
    """The reasons to doubt the best value. tried: sorted by value."""
    best = _best([Trial(trial["value"], trial["score"]) for trial in tried])
    if best is None:
        return "every value diverges"
    at = next(i for i, trial in enumerate(tried) if trial["value"] == best.value)
    remarks = []
    if _no_nearer(best.score, untouched):
        remarks.append("no nearer than the original model")
    if at in (0, len(tried) - 1):
        remarks.append(f"the {'highest' if at else 'lowest'} tried")
    if any(tried[i]["score"] is None for i in (at - 1, at + 1) if 0 <= i < len(tried)):
        remarks.append("a neighboring value diverges")
    return ", ".join(remarks) or None


def is_no_better_than_original(result: Mapping[str, Any] | None) -> bool:
    """Whether the method with its best value is no nearer to the predicted metrics than the original. Such a method has
    no effect at best, so ranking it would rank the original. result: as of `merged`.
    """
    if not result or result["chosen"] is None:
        return False
    score = next(trial["score"] for trial in result["tried"] if trial["value"] == result["chosen"])
    return _no_nearer(score, result["untouched"])


def _no_nearer(score: float | None, untouched: float) -> bool:
    return score is not None and score >= untouched


def predicted_retrain(task: Task) -> dict[str, float]:
    """The predicted UA, RA, TA and MIA of Retrain in percent, from the original, the task's model (see above)."""
    held, gone = held_out(task.data, task.split)
    validation, retain = predict(task, held), predict(task, task.split.retain)
    labels = task.labels(task.split.forget).cpu().numpy()
    called = np.zeros(len(held), bool)
    drawn = torch.randperm(len(held), generator=generator_of(task.options.seed, "halves"))
    halves = drawn.numpy() % 2 == 0
    for read in (halves, ~halves):  # each half by an attack fitted to the other
        member = features(retain.drawn(int((~read).sum()), task.options.seed))["confidence"]
        other = features(validation)["confidence"]
        called[read] = called_non_member(member, other[~read], other[read])
    return {
        "UA": _class_weighted_rate(labels, gone, ~validation.correct, validation.y),
        "RA": 100 * float(retain.correct.mean()),
        "TA": 100 * float(validation.correct.mean()),
        "MIA": _class_weighted_rate(labels, gone, called, validation.y),
    }


def validation_metrics(task: Task) -> dict[str, float]:
    """UA, RA, TA and MIA of the task's model in percent, with validation rows in place of test rows."""
    held, _ = held_out(task.data, task.split)
    forget, retain, validation = (predict(task, rows) for rows in (task.split.forget, task.split.retain, held))
    return {
        "UA": 100 * float((~forget.correct).mean()),
        "RA": 100 * float(retain.correct.mean()),
        "TA": 100 * float(validation.correct.mean()),
        "MIA": 100 * float(_called(retain.drawn(len(held), task.options.seed), validation, forget).mean()),
    }


def _called(members: Predicted, validation: Predicted, forget: Predicted) -> np.ndarray:
    member, other, target = (features(p)["confidence"] for p in (members, validation, forget))
    return called_non_member(member, other, target)


def held_out(data: ImageData, split: Split) -> tuple[torch.Tensor, set[int]]:
    """Validation rows of the retained classes, and the labels of the completely forgotten classes. Raises ConfigError
    for too few rows.
    """
    if not len(split.validation):
        raise ConfigError(
            "needs validation images, but the split has none", option="search", advice="Raise {validation_share}"
        )
    labels, rows = data.labels.cpu(), split.validation
    retained = torch.isin(labels[rows], labels[split.retain])
    gone = {int(y) for y in labels[split.forget]} - {int(y) for y in labels[split.retain]}
    if int(retained.sum()) < 4:
        raise ConfigError(
            "needs 4 validation images of retained classes", option="search", advice="Raise {validation_share}"
        )
    return rows[retained], gone


def _class_weighted_rate(labels: np.ndarray, gone: set[int], flags: np.ndarray, of: np.ndarray) -> float:
    """The percentage of true `flags` (of rows labeled `of`), classes weighted as in `labels`; 100 for `gone` ones."""
    rates = {
        int(y): 1.0 if int(y) in gone else float(flags[of == y].mean() if (of == y).any() else flags.mean())
        for y in np.unique(labels)
    }
    return 100 * sum(rates[int(y)] for y in labels) / len(labels)
