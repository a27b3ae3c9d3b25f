"""Previews: what a command would do, and about how long it would take. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from salun.classification.attacks.mia import infer_membership, settings
from salun.classification.compare import jobs_of, jobs_of_round, settings_of, variants_of, with_class_named, workers_of
from salun.classification.data import ImageData, data_of
from salun.classification.experiment import setup_of, training_of
from salun.classification.models import new_model, normalize_for
from salun.classification.options import TaskOptions, TrainOptions
from salun.classification.originals import key_of_training
from salun.classification.predictions import SplitPredictions
from salun.classification.search import rounds
from salun.classification.splits import Split, remarks
from salun.classification.stages import LATER, comparison_stages, passes_of, slow_training
from salun.classification.task import Task, cross_entropy, minimize, retain_batches
from salun.classification.unlearn_options import CompareOptions, UnlearnOptions
from salun.compute.device import deterministic_kernels, pick_dtype
from salun.masking.mask import Mask
from salun.methods import METHODS
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache

FEW = 256  # rows of each set that the time of an attack is measured on


def preview_training(
    options: TrainOptions, *, run_dir: Path | None = None, cache: Cache | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """What `train` would do. seconds: counted from one epoch on 512 images at most. Raises as `train`."""
    full, data, split = training_of(options)
    pace = _pace(full, data, split, progress)
    cached, seconds = _training(full, data, split, cache or Cache.of_user(), Stage.TRAINING, pace.image)
    notes = [*data.notes, *remarks(data, split), *slow_training(full, data, split)]
    return {**_summary(full, data, split), "notes": notes, "cached": {"original": cached}, "seconds": seconds}


def preview_unlearning(
    options: UnlearnOptions, *, run_dir: Path | None = None, cache: Cache | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """What `unlearn` would do. cached: whether the original and Retrain are in the cache, if they would be trained.

    no_retrain: why there is no Retrain, None if there is. seconds: as in `preview_training`. Raises as `unlearn`.
    """
    cache = cache or Cache.of_user()
    setting = setup_of(options, cache)
    resolved, data, split = setting.options, setting.data, setting.split
    cached = {}
    pace = _pace(setting.recipe, data, split, progress)
    method = METHODS["classification"][resolved.method]
    seconds = pace.image * passes_of(resolved, split) * (1 + ((len(method.factors) + LATER) if resolved.search else 0))
    seconds += pace.evaluation * (2 if setting.no_retrain is not None else 3)  # before, after, Retrain
    if setting.given is None:
        cached["original"], more = _training(
            setting.recipe, data, split.without_forget_set(), cache, Stage.TRAINING, pace.image
        )
        seconds += more
    if setting.no_retrain is None:
        cached["retrain"], more = _training(setting.recipe, data, split, cache, Stage.RETRAINING, pace.image)
        seconds += more
    chosen = {name: getattr(resolved, name) for name in ("mask", "epochs", "lr", "search")}
    given: dict[str, Any] = {"forget": resolved.forget, "given": resolved.original}
    given |= {"no_retrain": setting.no_retrain, "notes": setting.notes}
    return {
        **_summary(resolved, data, split),
        "method": method.title,
        **chosen,
        **given,
        "cached": cached,
        "seconds": seconds,
    }


def preview_comparison(
    options: CompareOptions, *, run_dir: Path | None = None, cache: Cache | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """What `compare` would do. seconds: as in `preview_training`, if nothing is cached. Raises as `compare`."""
    cache = cache or Cache.of_user()
    data = data_of(options)
    options = with_class_named(options, data)
    variants = variants_of(options)
    jobs = jobs_of(options, variants)
    checked = settings_of(options, jobs, cache, data)
    first = next(iter(checked.values()))
    pace = _pace(first.options, first.data, first.split, progress, threads=1)
    costs = comparison_stages(options, [(setting.options, setting.split) for setting in checked.values()])
    seconds = pace.image * sum(cost.backward * max(cost.most, cost.steps) / cost.steps for cost in costs)
    seconds += pace.evaluation * options.seeds * (len(variants) + (3 if options.noise_floor else 2))
    workers = workers_of(options)
    first_rounds = {
        job.name: jobs_of_round(job, next(rounds(checked[job.variant].options)), 0) for job in jobs["search"]
    }
    folder = run_dir / "jobs" if run_dir is not None else None
    counts = {}
    for kind, group in jobs.items():
        files = [[f"{each.name}.json" for each in first_rounds.get(job.name, [job])] for job in group]
        done = [names for names in files if folder is not None and all((folder / name).is_file() for name in names)]
        counts[kind] = {"all": len(group), "done": len(done)}
    return {
        "methods": [variant.name for variant in variants],
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "forget": len(first.split.forget),
        "forgetting": first.options.forget,
        "notes": first.notes,
        "train": len(first.split.train),
        "jobs": counts,
        "workers": workers,
        "device": str(first.data.device),
        "seconds": seconds / workers,
    }


def _summary(options: TaskOptions, data: ImageData, split: Split) -> dict[str, Any]:
    rows = {part: len(getattr(split, part)) for part in ("train", "validation", "test", "forget", "retain")}
    names = ("data", "model", "train_epochs", "train_lr", "train_batch_size", "seed")
    values = {name: getattr(options, name) for name in names}
    return {**values, "classes": len(data.classes), "rows": rows, "device": str(data.device)}


def _training(
    options: TaskOptions, data: ImageData, split: Split, cache: Cache, stage: Stage, pace: float
) -> tuple[bool, float]:
    """Whether the trained model is cached, and the seconds that its training takes if not."""
    assert options.model is not None and options.train_epochs is not None
    fresh = new_model(options.model, data.channels, len(data.classes), options.seed, options.allow_pickle)
    there = cache.get(key_of_training(options, normalize_for(fresh, data), split, fresh, stage)) is not None
    return there, 0.0 if there else pace * options.train_epochs * len(split.retain)


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, measured now: of an image in training, and of an evaluation with its attack."""

    image: float
    evaluation: float = 0.0


def _pace(options: TaskOptions, data: ImageData, split: Split, progress: Progress, threads: int | None = None) -> Pace:
    """The pace of a run of these options. split: an evaluation is measured if it has a forget set. threads: of a CPU,
    if the run sets their number.
    """
    before, on_cpu = torch.get_num_threads(), data.device.type == "cpu"
    try:
        if threads is not None and on_cpu:
            torch.set_num_threads(threads)
        with deterministic_kernels(options.deterministic):
            task = _untrained(options, data, split)
            image = _seconds_per_image(task, progress)
            return Pace(image, _seconds_per_evaluation(task, image) if len(split.forget) else 0.0)
    finally:
        torch.set_num_threads(before)


def _untrained(options: TaskOptions, data: ImageData, split: Split) -> Task:
    """A task with a new model, placed and computed with as in a run."""
    device = data.device
    fresh = partial(
        new_model, options.model or "", data.channels, len(data.classes), options.seed, options.allow_pickle
    )
    model = fresh().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = pick_dtype(options.dtype, device)
    task = Task(model, normalize_for(model, data), split, options, fresh, dtype=dtype)
    task.mask = Mask.full(task.parameters)
    return task


def _seconds_per_image(task: Task, progress: Progress) -> float:
    size = task.options.train_batch_size or 64
    rows = task.split.train[: min(512, 4 * size)]
    part = replace(task, split=replace(task.split, retain=rows))
    for _ in range(2):  # the first time is slower than the rest
        began = time.perf_counter()
        minimize(part, retain_batches(part, size), cross_entropy(part), epochs=1, lr=1e-6)
        progress(Event(Stage.MEASURING))
    return (time.perf_counter() - began) / len(rows)


def _seconds_per_evaluation(task: Task, image: float) -> float:
    """Predictions of all sets, which take a third of a training step, and the attack, from one on a few rows."""
    split, tested = task.split, task.split.retained_test_rows(task.data.labels)
    few = replace(split, forget=split.forget[:FEW], retain=split.retain[:FEW], test=tested[:FEW])
    target = SplitPredictions.of(replace(task, split=few))
    for _ in range(2):  # the first time imports its library
        began = time.perf_counter()
        infer_membership(target, settings(task.options))
    attack = time.perf_counter() - began
    rows, measured = (min(len(of.retain), len(test)) + len(test) for of, test in ((split, tested), (few, few.test)))
    predicted = len(split.forget) + len(split.retain) + len(tested)
    return image / 3 * predicted + attack * (rows / measured) ** 2
