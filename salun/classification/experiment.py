"""A classifier's runs: training an original, unlearning and its comparison with Retrain, and repeated evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun.attacks import requested
from salun.classification.data import ImageData, data_of
from salun.classification.masks import find_mask, layers_of
from salun.classification.metrics import accuracies, evaluate_classifier, gap_to_retrain
from salun.classification.models import (
    Preprocessing,
    WeightFileInfo,
    is_builtin,
    load_model,
    new_model,
    normalize_for,
    save_model,
    weights_digest,
)
from salun.classification.options import TrainOptions
from salun.classification.originals import Original, given_original, trained
from salun.classification.plan import forget_of, known_recipe, resolve_options, why_no_retrain
from salun.classification.search import search
from salun.classification.splits import Split, check_retained_test_rows, make_split, remarks, with_forget
from salun.classification.stages import slow_training, training_stages, unlearning_stages
from salun.classification.task import Task
from salun.classification.unlearn_options import UnlearnOptions
from salun.compute.device import deterministic_kernels, explained_memory_errors, pick_device, pick_dtype
from salun.display import shown
from salun.errors import ConfigError, DataError, literal
from salun.evaluation.retrain_verdict import verdict_on_classifier
from salun.files import write_bytes
from salun.masking.mask import Mask
from salun.methods import METHODS
from salun.options import from_mapping
from salun.progress import Event, Progress, Stage, silent
from salun.report.classification import run_page, train_page
from salun.runs.cache import Cache, digest_of
from salun.runs.reading import read_run
from salun.runs.record import RunRecord
from salun.user_text import as_spelled


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run: the model, the split it was evaluated on, its metrics, and its record."""

    model: nn.Module
    split: Split
    metrics: dict[str, Any]
    record: RunRecord


@dataclass(frozen=True, eq=False)
class ExperimentSetup:
    """All that is known before a run begins.

    options: resolved. recipe: the same options with those that the original was trained with, where its file records
    them; Retrain is trained with them. data: on the device. given: the original that `--original` names. no_retrain:
    why the run is not compared with Retrain, None if it is.
    """

    options: UnlearnOptions
    recipe: UnlearnOptions
    data: ImageData
    split: Split
    given: Original | None
    no_retrain: str | None
    cache: Cache

    @property
    def notes(self) -> list[str]:
        """What a user should know about the data and the split."""
        slow = slow_training(self.recipe, self.data, self.split) if self.given is None else []
        return [*self.data.notes, *remarks(self.data, self.split), *slow]

    def original(self, progress: Progress) -> Original:
        """The model to unlearn from: given, from the cache, or trained now."""
        if self.given is not None:
            return self.given
        return trained(self.recipe, self.data, self.split.without_forget_set(), self.cache, progress, Stage.TRAINING)

    def retrained(self, progress: Progress, seed: int | None = None) -> Original:
        """Retrain: from the cache, or trained now; with the original's first weights, or those of another seed."""
        recipe = self.recipe if seed is None else replace(self.recipe, seed=seed)
        return trained(recipe, self.data, self.split, self.cache, progress, Stage.RETRAINING)

    def task(self, model: Original, progress: Progress) -> Task:
        """The task of making this model forget."""
        return _task(model, self.data, self.split, self.options, progress, self.recipe)


def setup_of(options: UnlearnOptions, cache: Cache | None = None, data: ImageData | None = None) -> ExperimentSetup:
    """Load the data, if it is not given, draw the split and resolve the options. Raises as `train`."""
    data = data or data_of(options)
    split = make_split(data, options.test_share, options.validation_share, options.split_seed)
    split = with_forget(split, data, forget_of(options, data), options.seed)
    check_retained_test_rows(split, data)
    given = None
    if options.original is not None:
        given = given_original(options.original, data, split, options.allow_pickle)
    training = given.facts.training if given else None
    named, options = options.model, resolve_options(replace(options, forget=split.forgetting), data, split, training)
    no_retrain = why_no_retrain(options, training)
    if training is not None and named is None and (no_retrain is None or options.method == "retrain"):
        began = str(training.get("model"))
        if not is_builtin(began):  # the file may be untrusted input
            raise ConfigError(
                f"{options.original} states that its training began with {began}, a folder or a model of the hub, "
                "and Retrain would load it",
                advice=f"If you trust it, set {{model}} to {literal(began)}; otherwise set {{retrain}} to no",
            )
    recipe = replace(options, **training) if training is not None and known_recipe(training) else options
    pixels = given.facts.pixels or Preprocessing() if given else None
    data = _prepared(data, options, split, pixels)
    return ExperimentSetup(options, recipe, data, split, given, no_retrain, cache or Cache.of_user())


def open_record(setting: ExperimentSetup) -> RunRecord:
    """A record without a folder, for a run that is part of a larger one."""
    return RunRecord(None, "", asdict(setting.options), setting.options.seed, str(setting.data.device))


def metrics_of(task: Task) -> dict[str, Any]:
    """The metrics and the attacks that the task's options ask for."""
    return evaluate_classifier(task, requested(task.options))


def train(
    options: TrainOptions | None = None,
    *,
    progress: Progress | None = None,
    run_dir: Path | str | None = None,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.classification.train",
    **given: Any,
) -> Outcome:
    """Train an original, the model that is to be unlearned later, and measure its accuracy.

    given: fields of `TrainOptions`, over `options`. progress: as of
    `salun.erase`. run_dir: gets `model.safetensors`, `split.json`, `run.json` and
    `report.html`.
    resume: begin anew the unfinished run of these options in run_dir. cache: of trained models, the user's by default.
    Raises SalunError (ConfigError, DataError, ModelError, TrainingError), `Cancelled` if `progress` does.
    """
    train_options = TrainOptions(**{**asdict(options or TrainOptions()), **given})
    full, data, split = training_of(train_options)
    recorded, cache = {name: getattr(full, name) for name in asdict(train_options)}, cache or Cache.of_user()
    record = _record(run_dir, command, recorded, facts_of(full, data, split), data.device, resume)
    with shown(progress) as progress, record.running(), _computing(full):
        _keep_split(record, split)
        progress(Event(Stage.PLANNING, stages=training_stages(full, split)))
        notes = [*data.notes, *remarks(data, split), *slow_training(full, data, split)]
        _tell(record, notes, progress, Stage.PLANNING)
        with record.stage(Stage.TRAINING):
            original = trained(full, data, split, cache, progress, Stage.TRAINING)
        metrics = {**accuracies(_task(original, data, split, full, progress)), "RTE": _seconds(original.seconds)}
        record.losses, record.metrics = original.history, metrics
        _keep_model(record, original.model, replace(original.facts, role="original"))
        if record.folder is not None:
            train_page({**record.as_json(), "status": "done"}, data.classes).save(record.folder / "report.html")
    return Outcome(original.model, split, metrics, record)


def training_of(options: TrainOptions) -> tuple[UnlearnOptions, ImageData, Split]:
    """The resolved options of a training, its data on the device, and its split. Raises as `train`."""
    data = data_of(options)
    split = make_split(data, options.test_share, options.validation_share, options.split_seed)
    full = resolve_options(UnlearnOptions(**asdict(options)), data, split)
    return full, _prepared(data, full, split), split


def unlearn(
    options: UnlearnOptions | None = None,
    *,
    progress: Progress | None = None,
    run_dir: Path | str | None = None,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.classification.unlearn",
    **given: Any,
) -> Outcome:
    """Make a classifier forget some of its training images, and measure the gap to retraining without them.

    given: fields of `UnlearnOptions`, over `options`. progress: as of
    `salun.erase`. run_dir: gets `model.safetensors`, `mask.safetensors`,
    `split.json` and `run.json`. resume: begin anew the unfinished run of these options in run_dir; what it had trained
    (the original, Retrain) is taken from the cache. Raises as `train`.
    """
    setting = setup_of(UnlearnOptions(**{**asdict(options or UnlearnOptions()), **given}), cache)
    options, data, split = setting.options, setting.data, setting.split
    facts = facts_of(options, data, split, setting.given)
    record = _record(run_dir, command, asdict(options), facts, data.device, resume)
    with shown(progress) as progress, record.running(), _computing(options):
        _keep_split(record, split)
        trains, retrains = setting.given is None, setting.no_retrain is None
        stages = unlearning_stages(setting.options, setting.recipe, setting.split, trains, retrains)
        progress(Event(Stage.PLANNING, stages=stages))
        _tell(record, setting.notes, progress, Stage.PLANNING)
        with record.stage(Stage.ORIGINAL):
            original = setting.original(progress)
        _tell(record, original.notes, progress, Stage.ORIGINAL)
        task = setting.task(original, progress)
        with record.stage(Stage.EVALUATING):
            before = evaluate_classifier(task)
        if options.search:
            with record.stage(Stage.SEARCHING):
                task.options, record.more["search"] = search(task)
        seconds = forget(task, record)
        _tell(record, task.notes, progress, Stage.UNLEARNING)
        _keep_model(record, task.model, replace(original.facts, role="unlearned", split=split.digest))
        with record.stage(Stage.EVALUATING):
            metrics = {**metrics_of(task), "RTE": _seconds(seconds), "original": before}
        if options.search:  # a separate value: a search is made once for a setting, however often that is used
            metrics["RTE"]["search"] = record.more["search"]["seconds"]
        unknown = dict.fromkeys(("retrain", "gap", "gap_mean", "gap_original", "ToW"))
        metrics |= {**unknown, "reason": setting.no_retrain}
        if setting.no_retrain is None:
            with record.stage(Stage.RETRAINING):
                exact = setting.retrained(progress)
            with record.stage(Stage.EVALUATING):
                retrain_metrics = {**metrics_of(setting.task(exact, progress)), "RTE": _seconds(exact.seconds)}
            metrics |= {"retrain": retrain_metrics, **gap_to_retrain(metrics, retrain_metrics)}
            metrics["gap_original"] = gap_to_retrain(before, retrain_metrics)["gap_mean"]
        metrics["verdict"] = verdict_on_classifier(metrics).as_json()
        record.metrics = metrics
        _keep_report(record, task.mask, data.classes)
    return Outcome(task.model, split, metrics, record)


def evaluate(
    run: Path | str, *, data: str | None = None, device: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Evaluate a finished run's model again, on its own split; the metrics are also written to its `eval.json`.

    data: where the run's data is now; by default where it was. Returns UA, RA, TA and MIA for an unlearning, accuracies
    for an original. Raises ConfigError if the folder holds no such run, DataError if the data or the split has changed
    since the run.
    """
    folder = Path(run)
    try:
        record = read_run(folder)
        known = {name: record["options"][name] for name in asdict(UnlearnOptions()) if name in record["options"]}
        if record["status"] != "done" or "train_epochs" not in known:
            raise ValueError(f"its status is {record['status']!r}")
    except (DataError, ValueError) as error:
        raise ConfigError(f"{folder} is not a finished run of classify-train or classify-unlearn ({error})") from error
    options: UnlearnOptions = from_mapping(
        UnlearnOptions, {**known, "data": data or known["data"], "device": device}, str(folder / "run.json")
    )
    images = data_of(options)
    split = Split.load(folder / "split.json")
    if split.data != images.digest:
        raise DataError(f"the data set {options.data} has changed since {folder} was made")
    split.check_rows(len(images.labels), folder / "split.json")
    model, facts = load_model(folder / "model.safetensors")
    if (facts.base, facts.split) != (split.base, split.digest):
        raise DataError(
            f"{folder / 'split.json'} is not the split that {folder / 'model.safetensors'} was made with: one of them "
            "has been changed, or is of another run"
        )
    images = _prepared(images, options, split, facts.pixels or Preprocessing())
    task = _task(Original(model, facts), images, split, options, progress)
    metrics = evaluate_classifier(task) if len(split.forget) else accuracies(task)
    write_bytes(folder / "eval.json", (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def forget(task: Task, record: RunRecord) -> float:
    """Compute the mask and run the method. Returns the seconds that both took (RTE)."""
    method = METHODS["classification"][task.options.method]
    before = {name: p.detach().clone() for name, p in task.parameters.items()}
    began = time.perf_counter()
    if method.trains:
        with record.stage(Stage.SALIENCY):
            task.mask, record.mask = find_mask(task)
    with record.stage(Stage.UNLEARNING):
        method.call(task, task.options)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
    seconds = time.perf_counter() - began
    record.losses = task.history
    moved = sum(int((p != before[n]).sum()) for n, p in task.parameters.items())
    record.more["moved"] = moved / sum(p.numel() for p in before.values())
    if method.trains and record.folder is not None:
        assert task.mask is not None
        task.mask.save(record.folder / "mask.safetensors")
    return seconds


def _task(
    model: Original,
    data: ImageData,
    split: Split,
    options: UnlearnOptions,
    progress: Progress,
    recipe: UnlearnOptions | None = None,
) -> Task:
    device, facts = data.device, model.facts
    fresh = partial(
        new_model, facts.architecture, data.channels, len(data.classes), (recipe or options).seed, options.allow_pickle
    )
    placed = model.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster
    data, dtype = normalize_for(model.model, data), pick_dtype(options.dtype, device)
    return Task(placed, data, split, options, fresh, progress, dtype, recipe=recipe)


def _prepared(data: ImageData, options: UnlearnOptions, split: Split, pixels: Preprocessing | None = None) -> ImageData:
    """The data on the device, with the options' augmentation, and the mean and standard deviation of its pixels.

    pixels: as the file of a given model states them; None without such a model: then those of the training images, if
    the data set's are not known.
    """
    preset = {**data.preset, "augment": options.augment}
    if pixels is not None and pixels.mean is not None and pixels.std is not None:
        preset |= {"mean": list(pixels.mean), "std": list(pixels.std)}
    elif pixels is None and preset.get("counted"):
        preset["mean"], preset["std"] = data.statistics(split.train)
    return replace(data.to(pick_device(options.device)), preset=preset)


def facts_of(options: UnlearnOptions, data: ImageData, split: Split, given: Original | None = None) -> dict[str, str]:
    """What a run's result depends on besides its options. A fact named as an option describes that option's file.
    given: the original that `--original` names.
    """
    facts = {"data": data.digest, "split": split.digest}
    if given is not None:
        facts["original"] = weights_digest(given.model)
    folder = options.model is not None and as_spelled(Path(options.model).expanduser()).is_dir()
    if options.model is not None and (folder or given is None):  # one that cannot be loaded leaves no run folder
        fresh = new_model(options.model, data.channels, len(data.classes), options.seed, options.allow_pickle)
        if folder:
            facts["model"] = weights_digest(fresh)
    if options.forget is not None and options.forget.endswith(".json"):
        facts["forget"] = digest_of(split.forget)
    for package in ("scikit-learn", "datasets", "timm"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def _record(
    run_dir: Path | str | None,
    command: str,
    options: Mapping[str, Any],
    facts: Mapping[str, str],
    device: torch.device,
    resume: bool,
) -> RunRecord:
    if resume and run_dir is None:
        raise ConfigError("needs the folder of the run", option="resume", advice="Set {run_dir}")
    folder = Path(run_dir) if run_dir is not None else None
    return RunRecord(folder, command, options, options["seed"], str(device), facts, resume)


def _tell(record: RunRecord, notes: Sequence[str], progress: Progress, stage: Stage) -> None:
    """Add notes to the record, and show them."""
    record.notes += notes
    for note in notes:
        progress(Event(stage, message=note))


@contextmanager
def _computing(options: UnlearnOptions) -> Iterator[None]:
    """Within, kernels are deterministic if the options require it. Raises TrainingError if memory does not suffice."""
    with deterministic_kernels(options.deterministic), memory_errors():
        yield


def memory_errors() -> AbstractContextManager[None]:
    """Context manager: running out of memory says which options to try."""
    return explained_memory_errors("out of memory", "Use a smaller {batch_size} and {train_batch_size}")


def _keep_split(record: RunRecord, split: Split) -> None:
    if record.folder is not None:
        split.save(record.folder / "split.json")


def _keep_report(record: RunRecord, mask: Mask | None, classes: Sequence[str]) -> None:
    """Write the report, before the record is marked done: a run that is done has a report."""
    if record.folder is not None:
        run_page({**record.as_json(), "status": "done"}, layers_of(mask) if mask else {}, classes).save(
            record.folder / "report.html"
        )


def _keep_model(record: RunRecord, model: nn.Module, facts: WeightFileInfo) -> None:
    if record.folder is not None:
        path = record.folder / "model.safetensors"
        save_model(path, model, facts)
        record.add_output("model", path, path.name)


def _seconds(value: float | None) -> dict[str, Any]:
    return {"value": None if value is None else round(value, 3), "unit": "s"}
