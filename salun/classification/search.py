"""A method's learning rate (or its own strength), found without looking at Retrain.

Every method forgets too little at one rate and too much at another, and the best of them by the gap to Retrain cannot
be had without Retrain, which would make unlearning pointless. But what Retrain would be like is largely known: it never
saw the forget set, so it treats that as the original treats pictures that it never saw. Of those the split has some:
the validation rows, which no training and no judging touches. So the four figures are foretold,

    UA    the original's error on validation pictures of the same classes as the forget set; 100 % for a class that
          would be gone altogether
    RA    the original's accuracy on D_r
    TA    the original's accuracy on validation pictures of the classes that stay
    MIA   the share of validation pictures (classes as in the forget set) that an attack on the original calls no
          members, an attack that was made from other validation pictures; 100 % for a class that would be gone

and the value is taken whose model comes nearest to them in the mean (its TA is of validation pictures, too). The
smaller value wins a tie, as it changes the model less. What this does not foresee: that Retrain, trained on less,
generalises a little less.

Values are tried in rounds: a wide grid; a value further on where the best lies at an end of it, up to three; those half
way (in the logarithm) between the best and its neighbours. Of several seeds a round tries the same values at all of
them, and what counts is the mean; a value at which one of them comes apart cannot be taken. The grid lies around the
method's default, which was found by the same search.
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

from salun.attacks.mia import called_non_member, features
from salun.classification.data import ImageData
from salun.classification.masks import find_mask
from salun.classification.metrics import COMPARED
from salun.classification.options import TaskOptions
from salun.classification.predictions import Predicted, predict
from salun.classification.splits import Split
from salun.classification.task import Task
from salun.errors import ConfigError, TrainingError
from salun.methods import METHODS, Method
from salun.progress import Event, Stage
from salun.randomness import generator_of

Options = TypeVar("Options", bound=TaskOptions)
FURTHER = 3  # values beyond an end of the grid, where the best lies there


@dataclass(frozen=True)
class Trial:
    """A value that was tried. score: points. figures: percent. Both None, with the reason, if training came apart."""

    value: float
    score: float | None
    figures: dict[str, float] | None = None
    reason: str | None = None


def search(task: Task) -> tuple[TaskOptions, dict[str, Any]]:
    """The task's options with the best value, and what `run.json` says of the search. The task is left as it was.

    Raises ConfigError for a split without validation rows or a method without anything to find, TrainingError if no
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
        raise TrainingError(f"the search failed: every {result['option']} diverges ({result['tried'][0]['reason']})")
    return with_value(task.options, result["option"], result["chosen"]), result


def rounds(options: TaskOptions) -> Generator[list[float], list[Trial], None]:
    """The values to try, a round at a time; it is sent all trials so far. Raises ConfigError for a method without an
    option to find.
    """
    method = _tuned(options)
    assert method.tunes is not None
    centre = float(getattr(options, method.tunes))
    tried = yield [centre * factor for factor in method.factors]
    for _ in range(FURTHER):
        value = extend_grid(tried)
        if value is None:
            break
        tried = yield [value]
    nearby = refine_grid(tried)
    if nearby:
        yield nearby


def check_search(options: TaskOptions, data: ImageData, split: Split) -> None:
    """Raises ConfigError for a search that cannot be made: of a method without an option to find, or by too few
    validation pictures.
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
    """The next round of a search that has found what is `told` so far; no values where it is at its end."""
    try:
        return searching.send([Trial(trial["value"], trial["score"]) for trial in result["tried"]])
    except StopIteration:
        return []


def trials(task: Task, values: Sequence[float], before: int = 0) -> dict[str, Any]:
    """What one model makes of these values: {"option", "foretold", "untouched", "tried", "seconds"}.

    untouched: the score of θ_o as it is, which a method must better to be of use. before: trials of earlier rounds, for
    the progress. Raises ConfigError for a split without validation rows.
    """
    method = METHODS["classification"][task.options.method]
    assert method.tunes is not None
    began = time.perf_counter()
    wanted = predicted_retrain(task)
    if method.trains and task.mask is None:
        task = replace(task, mask=find_mask(task)[0])
    tried = []
    for value in values:
        tried.append(_trial(task, method.tunes, value, wanted))
        shown = {method.tunes: value} | ({} if tried[-1].score is None else {"off by": tried[-1].score})
        task.progress(Event(Stage.SEARCHING, before + len(tried), before + len(values), shown))
    return {
        "option": method.tunes,
        "foretold": wanted,
        "untouched": _off_by(figures(task), wanted),
        "tried": [asdict(trial) for trial in tried],
        "seconds": round(time.perf_counter() - began, 3),
    }


def merged(found: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One search of several seeds' trials of the same values, and of earlier rounds: what `run.json` says of it.

    chosen: the value with the least mean score of those that gave a model at every seed, None if none did. remark: what
    to hold against it: that it is the last one tried on its side, that training comes apart next to it, or that it is
    no nearer than θ_o as it is; None if nothing is. runs: of training. A seed without trials, which has an "error",
    makes them all fail.
    """
    before = before or {}
    failed = next((result["error"] for result in found if "error" in result), None)
    if failed is not None:
        return {"option": None, "foretold": None, "untouched": None, "tried": [], "runs": 0, "seconds": 0.0, **before,
                "chosen": None, "remark": f"none: {failed}", "error": failed}  # fmt: skip
    first = found[0]
    tried = [*before.get("tried", ())]
    for at, trial in enumerate(first["tried"]):
        seeds = [result["tried"][at] for result in found]
        scores = [trial["score"] for trial in seeds if trial["score"] is not None]
        good = len(scores) == len(seeds)
        tried.append(
            {
                "value": trial["value"],
                "score": sum(scores) / len(scores) if good else None,
                "figures": {k: sum(each["figures"][k] for each in seeds) / len(seeds) for k in COMPARED}
                if good
                else None,
                "reason": next((trial["reason"] for trial in seeds if trial["reason"]), None),
            }
        )
    tried.sort(key=lambda trial: float(trial["value"]))
    untouched = sum(result["untouched"] for result in found) / len(found)
    best = _best([Trial(trial["value"], trial["score"]) for trial in tried])
    return {
        "option": first["option"],
        "chosen": best.value if best else None,
        "remark": _remark(tried, untouched),
        "foretold": {k: sum(result["foretold"][k] for result in found) / len(found) for k in COMPARED},
        "untouched": untouched,
        "tried": tried,
        "runs": before.get("runs", 0) + sum(len(result["tried"]) for result in found),
        "seconds": round(before.get("seconds", 0.0) + sum(result["seconds"] for result in found), 3),
    }


def with_value(options: Options, name: str, value: float) -> Options:
    """The options with another value of the one that is searched for. Raises ConfigError if it is out of range."""
    changed: dict[str, Any] = {name: value}
    return replace(options, **changed)


def _trial(task: Task, option: str, value: float, wanted: dict[str, float]) -> Trial:
    def heard(event: Event, /) -> None:
        task.progress(Event(Stage.SEARCHING))  # no step of its own, but a chance to be cancelled

    try:
        options = with_value(task.options, option, value)
        tried = replace(task, model=deepcopy(task.model), options=options, progress=heard, history=[])
        METHODS["classification"][options.method].call(tried, options)
        found = figures(tried)
    except (TrainingError, ConfigError) as error:
        return Trial(value, None, None, str(error))
    return Trial(value, _off_by(found, wanted), found)


def _off_by(found: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    return sum(abs(found[name] - wanted[name]) for name in COMPARED) / len(COMPARED)


def _best(tried: Sequence[Trial]) -> Trial | None:
    scored = [trial for trial in tried if trial.score is not None]
    return min(scored, key=lambda trial: (trial.score, trial.value)) if scored else None


def extend_grid(tried: Sequence[Trial]) -> float | None:
    """The next value past an end of the grid: where the best is, or below it, where no value gives a model.

    None if the best lies within, or is no better than the one beside it.
    """
    tried = sorted(tried, key=lambda trial: trial.value)
    best = _best(tried)
    if len(tried) < 2:
        return None
    if best is None:
        return tried[0].value ** 2 / tried[1].value
    if best.value not in (tried[0].value, tried[-1].value):
        return None
    end, beside = (tried[0], tried[1]) if best.value == tried[0].value else (tried[-1], tried[-2])
    return None if beside.score == best.score else end.value**2 / beside.value


def refine_grid(tried: Sequence[Trial]) -> list[float]:
    """The geometric means of the best value and its neighbours, those that came apart too; none where none is best."""
    values, best = sorted(trial.value for trial in tried), _best(tried)
    if best is None:
        return []
    at = values.index(best.value)
    return [sqrt(best.value * values[i]) for i in (at - 1, at + 1) if 0 <= i < len(values) and values[i] > 0]


def _remark(tried: Sequence[Mapping[str, Any]], untouched: float) -> str | None:
    """tried: rising by value."""
    best = _best([Trial(trial["value"], trial["score"]) for trial in tried])
    if best is None:
        return "no value gives a model"
    at = next(i for i, trial in enumerate(tried) if trial["value"] == best.value)
    remarks = []
    if _no_nearer(best.score, untouched):
        remarks.append("no nearer than the untouched model")
    if at in (0, len(tried) - 1):
        remarks.append(f"the {'highest' if at else 'lowest'} tried")
    if any(tried[i]["score"] is None for i in (at - 1, at + 1) if 0 <= i < len(tried)):
        remarks.append("comes apart next to it")
    return ", ".join(remarks) or None


def is_no_better_than_original(result: Mapping[str, Any] | None) -> bool:
    """Whether the best value that a search found brings a method no nearer than the model as it was: such a method is
    at its best doing nothing, and a place among the others would be the original's. told: as of `merged`.
    """
    if not result or result["chosen"] is None:
        return False
    score = next(trial["score"] for trial in result["tried"] if trial["value"] == result["chosen"])
    return _no_nearer(score, result["untouched"])


def _no_nearer(score: float | None, untouched: float) -> bool:
    return score is not None and score >= untouched


def predicted_retrain(task: Task) -> dict[str, float]:
    """What the task's model, the original, lets expect of Retrain: UA, RA, TA and MIA in percent (see above)."""
    held, gone = held_out(task.data, task.split)
    validation, retain = predict(task, held), predict(task, task.split.retain)
    labels = task.labels(task.split.forget).cpu().numpy()
    called = np.zeros(len(held), bool)
    drawn = torch.randperm(len(held), generator=generator_of(task.options.seed, "halves"))
    halves = drawn.numpy() % 2 == 0
    for read in (halves, ~halves):  # each half by an attack made from the other
        member = features(retain.drawn(int((~read).sum()), task.options.seed))["confidence"]
        other = features(validation)["confidence"]
        called[read] = called_non_member(member, other[~read], other[read])
    return {
        "UA": _class_weighted_rate(labels, gone, ~validation.correct, validation.y),
        "RA": 100 * float(retain.correct.mean()),
        "TA": 100 * float(validation.correct.mean()),
        "MIA": _class_weighted_rate(labels, gone, called, validation.y),
    }


def figures(task: Task) -> dict[str, float]:
    """UA, RA, TA and MIA of the task's model in percent as `judge` has them, but with validation rows for test ones."""
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
    """Validation rows of the classes that D_r still has, and the labels of the others that D_f has. Raises ConfigError
    for fewer rows than can be judged by.
    """
    if not len(split.validation):
        raise ConfigError(
            "needs validation images, and there are none", option="search", advice="Raise {validation_share}"
        )
    labels, rows = data.labels.cpu(), split.validation
    kept = torch.isin(labels[rows], labels[split.retain])
    gone = {int(y) for y in labels[split.forget]} - {int(y) for y in labels[split.retain]}
    if int(kept.sum()) < 4:
        raise ConfigError(
            "needs 4 validation images of retained classes", option="search", advice="Raise {validation_share}"
        )
    return rows[kept], gone


def _class_weighted_rate(labels: np.ndarray, gone: set[int], flags: np.ndarray, of: np.ndarray) -> float:
    """The share of `flags` (of rows labelled `of`) in percent, classes weighted as in `labels`; 1 for those gone."""
    shares = {
        int(y): 1.0 if int(y) in gone else float(flags[of == y].mean() if (of == y).any() else flags.mean())
        for y in np.unique(labels)
    }
    return 100 * sum(shares[int(y)] for y in labels) / len(labels)
