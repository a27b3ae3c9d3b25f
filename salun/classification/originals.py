"""The original, the model to unlearn from: given, or trained and cached. Retrain is trained by the same function."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from salun.classification.data import ImageData
from salun.classification.models import (
    Preprocessing,
    WeightFileInfo,
    first_label_mismatch,
    has_default_labels,
    load_model,
    new_model,
    normalize_for,
    stock_model,
)
from salun.classification.options import TaskOptions, TrainOptions
from salun.classification.plan import RECIPE, recipe_of
from salun.classification.splits import Split
from salun.classification.task import Task, train_from_scratch
from salun.classification.training_state import TrainingState
from salun.compute.device import deterministic_kernels, pick_dtype
from salun.compute.environment import versions
from salun.errors import DataError, ModelError
from salun.masking.training_state import LossRow
from salun.options import from_mapping
from salun.progress import Progress, Stage
from salun.runs.cache import Cache, digest_of, key_of
from salun.user_text import as_spelled


@dataclass(frozen=True, eq=False)
class Original:
    """A trained model and the metadata of its file.

    seconds: of its training, None if unknown. history: as `Task.history`. notes: what a user should know.
    """

    model: nn.Module
    facts: WeightFileInfo
    seconds: float | None = None
    history: list[LossRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def trained(
    options: TaskOptions, data: ImageData, split: Split, cache: Cache, progress: Progress, stage: Stage
) -> Original:
    """A model trained from scratch on the split's retain rows by resolved options; from the cache if it is there.

    The cache also holds the state of a training that was interrupted, which continues to the same bytes.
    The split of an original has an empty forget set; Retrain's has one. Both begin with the same weights. stage: what
    the random numbers of its batches depend on besides the seed.
    """
    device = data.device
    assert options.model is not None
    fresh = partial(
        new_model, options.model, data.channels, len(data.classes), options.seed, allow_pickle=options.allow_pickle
    )
    model = fresh()
    data = normalize_for(model, data)
    key = key_of_training(options, data, split, model, stage)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = recipe_of(options, device)
    size = (int(data.images.shape[2]), int(data.images.shape[3]))
    pixels = Preprocessing(tuple(data.preset["mean"]), tuple(data.preset["std"]), size)
    facts = WeightFileInfo(options.model, data.channels, data.classes, stage, split.base, split.digest, recipe, pixels)
    cached = cache.get(key)
    if cached is not None:
        losses = cached.pop("history")
        seconds = float(cached.pop("seconds"))
        model.load_state_dict(cached)
        history: list[LossRow] = [{"epoch": int(epoch), "retain": loss} for epoch, loss in losses.tolist()]
        return Original(model.eval(), facts, seconds, history)
    task = Task(model, data, split, options, fresh, progress, pick_dtype(options.dtype, device))
    began = time.perf_counter()
    state = TrainingState(cache.file_of(key_of(state=key)), key)
    with deterministic_kernels(options.deterministic):
        train_from_scratch(task, stage, state)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began + state.seconds_before
    losses = torch.tensor([(row["epoch"], row["retain"]) for row in task.history], dtype=torch.float64)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    cache.put(key, {**weights, "seconds": torch.tensor(seconds, dtype=torch.float64), "history": losses})
    state.remove()
    return Original(model, facts, seconds, task.history)


def key_of_training(options: TaskOptions, data: ImageData, split: Split, fresh: nn.Module, stage: Stage) -> str:
    """The cache key of a trained model: a hash of all that its weights depend on.

    fresh: the model before training; its weights are hashed because the options only name a pretrained model. The key
    includes the versions of the libraries and, on a CPU, the number of threads and the instruction set, which change
    the order of sums. stage: what its batches are drawn by.
    """
    device = data.device
    if device.type == "cuda":
        where = [torch.cuda.get_device_name(device)]
    else:
        where = [device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
    return key_of(
        kind="classifier-4", options=recipe_of(options, device), data=split.data, rows=split.retain.tolist(),
        normalised=[data.preset[k] for k in ("mean", "std")],  # codespell:ignore normalised
        weights=digest_of(*fresh.state_dict().values()),
        where=where, versions={k: v for k, v in versions().items() if k != "platform"}, stage=stage,
    )  # fmt: skip


def given_original(name: str, data: ImageData, split: Split, allow_pickle: bool = False) -> Original:
    """A given original: a run folder, a .safetensors file, or a transformers folder or hub id.

    Raises ModelError if it is invalid, its classes or channels are not the data's, or it is not an original;
    DataError if it was trained on another split.
    """
    path = as_spelled(Path(name).expanduser())
    if (path / "model.safetensors").is_file() and not (path / "config.json").is_file():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        model, facts = load_model(path)
    else:
        model, classes = stock_model(name, allow_pickle)
        facts = WeightFileInfo(name, 3, classes, "original", split.base, training={"model": name})
        _checked(facts, name, data)
        return Original(model, facts, notes=tuple(_unverified_claims(name, model, classes, data)))
    _checked(facts, str(path), data)
    unknown = sorted({*facts.training} - {*RECIPE})
    if unknown:
        raise ModelError(f"{path} is damaged: its training options include {', '.join(unknown)}, which do not exist")
    from_mapping(TrainOptions, facts.training, str(path))
    if facts.channels != data.channels:
        raise ModelError(f"{path} takes images of {facts.channels} channels, but {data.name} has {data.channels}")
    if facts.role != "original":
        raise ModelError(
            f"{path} is an {facts.role} model, but must be an original", advice="Use one made by `salun classify-train`"
        )
    if facts.base != split.base:
        raise DataError(
            f"{path} was trained on another split of the data, or on other data",
            advice="Repeat the {data}, {split_seed}, {test_share} and {validation_share} that it was trained with",
        )
    return Original(model, facts)


def _checked(facts: WeightFileInfo, where: str, data: ImageData) -> None:
    if len(facts.classes) != len(data.classes):
        raise ModelError(f"{where} has {len(facts.classes)} classes, but {data.name} has {len(data.classes)}")
    other = None if has_default_labels(facts.classes) else first_label_mismatch(facts.classes, data.classes)
    if other is not None:
        raise ModelError(
            f"{where} has a class {other[0]!r} where {data.name} has {other[1]!r}, but both must have the same classes "
            "in the same order",
            advice="Name the data's folders as the model does, or correct id2label in the model's config.json",
        )


def _unverified_claims(name: str, model: nn.Module, classes: Sequence[str], data: ImageData) -> Iterator[str]:
    """Notes on what cannot be verified about a model that was not trained here."""
    yield f"the training data of {name} is unknown: it may not include the forget set, or include test images"
    if has_default_labels(classes):
        yield f"{name} does not name its classes: they are assumed to be in the order of {data.name}'s"
    if normalize_for(model, data) is data:
        yield f"{name} has no image processor that states the mean and std of its pixels: those of {data.name} are used"
