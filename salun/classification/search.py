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

and the value of a small grid is taken whose model comes nearest to them in the mean (its TA is of validation pictures,
too). The smaller value wins a tie, as it changes the model less. What this does not foresee: that Retrain, trained on
less, generalises a little less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from salun.classification.masks import find_mask
from salun.classification.methods import METHODS
from salun.classification.metrics import COMPARED, Predicted, called_non_member, features, predict
from salun.classification.options import UnlearnOptions
from salun.classification.task import Task
from salun.errors import ConfigError, TrainingError
from salun.progress import Event

FURTHER = 3  # values beyond an end of the grid, where the best lies there


@dataclass(frozen=True)
class Trial:
    """A value that was tried. figures: percent; None, with the reason, if training came apart. score: points."""

    value: float
    score: float | None
    figures: dict[str, float] | None
    reason: str | None = None


def search(task: Task) -> tuple[UnlearnOptions, dict[str, Any]]:
    """The task's options with the best value, and what `run.json` says of the search. The task is left as it was.

    The grid is the method's, around the value that the options have; where the best lies at an end, up to three more
    are tried beyond it. Raises ConfigError for a split without validation rows or a method without anything to find,
    TrainingError if no value gives a model.
    """
    method = METHODS[task.options.method]
    if method.tunes is None:
        raise ConfigError(f"--search: the method {method.title} has nothing to search for; leave it out")
    if not len(task.split.validation):
        raise ConfigError("--search compares with validation pictures, and there are none: raise --validation-share")
    began = time.perf_counter()
    wanted = foretold(task)
    if method.epochs is not None and task.mask is None:
        task = replace(task, mask=find_mask(task)[0])
    centre = float(getattr(task.options, method.tunes))
    tried: list[Trial] = []

    def attempt(value: float, total: int) -> None:
        tried.append(_trial(task, method.tunes or "", value, wanted))
        shown = {method.tunes or "": value} | ({} if tried[-1].score is None else {"off by": tried[-1].score})
        task.progress(Event("searching", len(tried), total, shown))

    for factor in method.factors:
        attempt(centre * factor, len(method.factors))
    for more in range(1, FURTHER + 1):
        further = beyond(tried)
        if further is None:
            break
        attempt(further, len(method.factors) + more)
    chosen = _best(tried)
    if chosen is None:
        raise TrainingError(f"--search: no {method.tunes} gives a model ({tried[0].reason})")
    told = {
        "option": method.tunes,
        "chosen": chosen.value,
        "foretold": wanted,
        "tried": [asdict(trial) for trial in sorted(tried, key=lambda t: t.value)],
        "seconds": round(time.perf_counter() - began, 3),
    }
    return with_value(task.options, method.tunes, chosen.value), told


def with_value(options: UnlearnOptions, name: str, value: float) -> UnlearnOptions:
    """The options with another value of the one that is searched for. Raises ConfigError if it is out of range."""
    changed: dict[str, Any] = {name: value}
    return replace(options, **changed)


def merged(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One search of several seeds' searches: the value with the least mean score of those that all of them tried.

    None of none. Raises TrainingError if no value gives a model at every seed.
    """
    found = [told for told in found if "error" not in told]
    if not found:
        return None
    scores: dict[float, list[float | None]] = {}
    for told in found:
        for trial in told["tried"]:
            scores.setdefault(trial["value"], []).append(trial["score"])
    means = {
        value: sum(s for s in some if s is not None) / len(some)
        for value, some in scores.items()
        if len(some) == len(found) and None not in some
    }
    if not means:
        raise TrainingError(f"--search: no {found[0]['option']} gives a model at every seed")
    return {
        "option": found[0]["option"],
        "chosen": min(means, key=lambda value: (means[value], value)),
        "tried": [{"value": value, "score": means[value]} for value in sorted(means)],
        "runs": sum(len(told["tried"]) for told in found),
        "seconds": sum(told["seconds"] for told in found),
    }


def _trial(task: Task, option: str, value: float, wanted: dict[str, float]) -> Trial:
    def heard(event: Event, /) -> None:
        task.progress(Event("searching"))  # no step of its own, but a chance to be cancelled

    try:
        options = with_value(task.options, option, value)
        tried = replace(task, model=deepcopy(task.model), options=options, progress=heard, history=[])
        METHODS[options.method].run(tried)
        found = figures(tried)
    except (TrainingError, ConfigError) as error:
        return Trial(value, None, None, str(error))
    return Trial(value, sum(abs(found[name] - wanted[name]) for name in COMPARED) / len(COMPARED), found)


def _best(tried: list[Trial]) -> Trial | None:
    scored = [trial for trial in tried if trial.score is not None]
    return min(scored, key=lambda trial: (trial.score, trial.value)) if scored else None


def beyond(tried: list[Trial]) -> float | None:
    """The next value past the end of the grid where the best is; None if it lies within, or is no better than the one
    beside it.
    """
    values, best = sorted(trial.value for trial in tried), _best(tried)
    if best is None or len(values) < 2 or best.value not in (values[0], values[-1]):
        return None
    beside = values[1] if best.value == values[0] else values[-2]
    if any(trial.value == beside and trial.score == best.score for trial in tried):
        return None
    return values[0] ** 2 / values[1] if best.value == values[0] else values[-1] ** 2 / values[-2]


def foretold(task: Task) -> dict[str, float]:
    """What the task's model, the original, lets expect of Retrain: UA, RA, TA and MIA in percent (see above)."""
    held, gone = _held_out(task)
    validation, retain = predict(task, held), predict(task, task.split.retain)
    labels = task.labels(task.split.forget).cpu().numpy()
    called = np.zeros(len(held), bool)
    drawn = torch.randperm(len(held), generator=torch.Generator().manual_seed(task.options.seed))
    halves = drawn.numpy() % 2 == 0
    for read in (halves, ~halves):  # each half by an attack made from the other
        member = features(retain.first(int((~read).sum())))["confidence"]
        other = features(validation)["confidence"]
        called[read] = called_non_member(member, other[~read], other[read])
    return {
        "UA": _like(labels, gone, ~validation.correct, validation.y),
        "RA": 100 * float(retain.correct.mean()),
        "TA": 100 * float(validation.correct.mean()),
        "MIA": _like(labels, gone, called, validation.y),
    }


def figures(task: Task) -> dict[str, float]:
    """UA, RA, TA and MIA of the task's model in percent as `judge` has them, but with validation rows for test ones."""
    held, _ = _held_out(task)
    forget, retain, validation = (predict(task, rows) for rows in (task.split.forget, task.split.retain, held))
    return {
        "UA": 100 * float((~forget.correct).mean()),
        "RA": 100 * float(retain.correct.mean()),
        "TA": 100 * float(validation.correct.mean()),
        "MIA": 100 * float(_called(retain, validation, forget).mean()),
    }


def _called(retain: Predicted, validation: Predicted, forget: Predicted) -> np.ndarray:
    member, other, target = (features(p)["confidence"] for p in (retain.first(len(validation.y)), validation, forget))
    return called_non_member(member, other, target)


def _held_out(task: Task) -> tuple[torch.Tensor, set[int]]:
    """Validation rows of the classes that D_r still has, and the labels of the others that D_f has."""
    labels, rows = task.data.labels.cpu(), task.split.validation
    kept = torch.isin(labels[rows], labels[task.split.retain])
    gone = {int(y) for y in labels[task.split.forget]} - {int(y) for y in labels[task.split.retain]}
    if int(kept.sum()) < 4:
        raise ConfigError("--search needs 4 validation pictures of classes that stay: raise --validation-share")
    return rows[kept], gone


def _like(labels: np.ndarray, gone: set[int], flags: np.ndarray, of: np.ndarray) -> float:
    """The share of `flags` (of rows labelled `of`) in percent, classes weighted as in `labels`; 1 for those gone."""
    shares = {
        int(y): 1.0 if int(y) in gone else float(flags[of == y].mean() if (of == y).any() else flags.mean())
        for y in np.unique(labels)
    }
    return 100 * sum(shares[int(y)] for y in labels) / len(labels)
