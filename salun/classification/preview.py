"""Previews: what a command would do, and about how long it would take. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from salun.classification.compare import jobs_of, jobs_of_round, settings_of, variants_of, with_class_named, workers_of
from salun.classification.data import ImageData, load_data
from salun.classification.experiment import setup_of, training_of
from salun.classification.models import new_model, normalize_for
from salun.classification.options import TaskOptions, TrainOptions
from salun.classification.originals import key_of_training
from salun.classification.search import rounds
from salun.classification.splits import Split, remarks
from salun.classification.stages import LATER, comparison_stages, passes_of
from salun.classification.task import Task, cross_entropy, minimize, retain_batches
from salun.classification.unlearn_options import CompareOptions, UnlearnOptions
from salun.masking.mask import Mask
from salun.methods import METHODS
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache


def preview_training(
    options: TrainOptions, *, run_dir: Path | None = None, cache: Cache | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """What `train` would do. seconds: counted from one epoch on 512 images at most. Raises as `train`."""
    full, data, split = training_of(options)
    pace = _seconds_per_image(full, data, split, progress)
    cached, seconds = _training(full, data, split, cache or Cache.of_user(), Stage.TRAINING, pace)
    notes = [*data.notes, *remarks(data, split)]
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
    pace = _seconds_per_image(setting.recipe, data, split.without_forget_set(), progress)
    method = METHODS["classification"][resolved.method]
    seconds = pace * passes_of(resolved, split) * (1 + ((len(method.factors) + LATER) if resolved.search else 0))
    if setting.given is None:
        cached["original"], more = _training(
            setting.recipe, data, split.without_forget_set(), cache, Stage.TRAINING, pace
        )
        seconds += more
    if setting.no_retrain is None:
        cached["retrain"], more = _training(setting.recipe, data, split, cache, Stage.RETRAINING, pace)
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
    data = load_data(options.data, options.image_size, options.image_column, options.label_column)
    options = with_class_named(options, data)
    variants = variants_of(options)
    jobs = jobs_of(options, variants)
    checked = settings_of(options, jobs, cache, data)
    settings = list(checked.values())
    first = settings[0]
    pace = _seconds_per_image(first.options, first.data, first.split.without_forget_set(), progress)
    costs = comparison_stages(options, [(setting.options, setting.split) for setting in settings])
    seconds = pace * sum(cost.backward * max(cost.most, cost.steps) / cost.steps for cost in costs)
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
        "device": str(first.data.images.device),
        "seconds": seconds / workers,
    }


def _summary(options: TaskOptions, data: ImageData, split: Split) -> dict[str, Any]:
    rows = {part: len(getattr(split, part)) for part in ("train", "validation", "test", "forget", "retain")}
    names = ("data", "model", "train_epochs", "train_lr", "train_batch_size", "seed")
    values = {name: getattr(options, name) for name in names}
    return {**values, "classes": len(data.classes), "rows": rows, "device": str(data.images.device)}


def _training(
    options: TaskOptions, data: ImageData, split: Split, cache: Cache, stage: Stage, pace: float
) -> tuple[bool, float]:
    """Whether the trained model is cached, and the seconds that its training takes if not."""
    assert options.model is not None and options.train_epochs is not None
    fresh = new_model(options.model, data.channels, len(data.classes), options.seed, options.allow_pickle)
    there = cache.get(key_of_training(options, normalize_for(fresh, data), split, fresh, stage)) is not None
    return there, 0.0 if there else pace * options.train_epochs * len(split.retain)


def _seconds_per_image(options: TaskOptions, data: ImageData, split: Split, progress: Progress) -> float:
    """Seconds per image in training, measured on this machine now."""
    fresh = partial(
        new_model, options.model or "", data.channels, len(data.classes), options.seed, options.allow_pickle
    )
    model = fresh().to(data.images.device)
    task = Task(model, normalize_for(model, data), split, options, fresh)
    size = options.train_batch_size or 64
    rows = split.retain[: min(512, 4 * size)]
    task.split, task.mask = replace(split, retain=rows), Mask.full(task.parameters)
    for _ in range(2):  # the first time is slower than the rest
        began = time.perf_counter()
        minimize(task, retain_batches(task, size), cross_entropy(task), epochs=1, lr=1e-6)
        progress(Event(Stage.MEASURING))
    return (time.perf_counter() - began) / len(rows)
