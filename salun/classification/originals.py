"""The model that is to forget: given, or trained here and kept in the cache. Retrain comes about the same way."""

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
    """A trained model and what its file says of it.

    seconds: its training took, None where nobody knows. history: as `Task.history`. notes: what a user should know.
    """

    model: nn.Module
    facts: WeightFileInfo
    seconds: float | None = None
    history: list[LossRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def trained(
    options: TaskOptions, data: ImageData, split: Split, cache: Cache, progress: Progress, stage: Stage
) -> Original:
    """A model trained from scratch on the split's retain rows by settled options; from the cache if it was before.

    An original has a split in which nothing is forgotten yet, so that retain is all of train; Retrain one with a forget
    set. Both begin at the same weights. stage: what the random numbers of its batches depend on beside the seed.
    """
    device = data.images.device
    assert options.model is not None
    fresh = partial(
        new_model, options.model, data.channels, len(data.classes), options.seed, allow_pickle=options.allow_pickle
    )
    model = fresh()
    data = normalize_for(model, data)
    key = key_of_training(options, data, split, model, stage)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = recipe_of(options, device)
    facts = WeightFileInfo(options.model, data.channels, data.classes, stage, split.base, split.digest, recipe)
    cached = cache.get(key)
    if cached is not None:
        losses = cached.pop("history")
        seconds = float(cached.pop("seconds"))
        model.load_state_dict(cached)
        history: list[LossRow] = [{"epoch": int(epoch), "retain": loss} for epoch, loss in losses.tolist()]
        return Original(model.eval(), facts, seconds, history)
    task = Task(model, data, split, options, fresh, progress, pick_dtype(options.dtype, device))
    began = time.perf_counter()
    with deterministic_kernels(options.deterministic):
        train_from_scratch(task, stage)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    losses = torch.tensor([(row["epoch"], row["retain"]) for row in task.history], dtype=torch.float64)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    cache.put(key, {**weights, "seconds": torch.tensor(seconds, dtype=torch.float64), "history": losses})
    return Original(model, facts, seconds, task.history)


def key_of_training(options: TaskOptions, data: ImageData, split: Split, fresh: nn.Module, stage: Stage) -> str:
    """The cache's key of a model trained so: a hash of all that its bits depend on.

    fresh: the model before training, whose weights count, for a pretrained body is known by no more than its name. The
    versions of the libraries count, and on a CPU the number of threads and the instructions it has: sums are taken in
    another order by others. stage: what its batches are drawn by.
    """
    device = data.images.device
    if device.type == "cuda":
        where = [torch.cuda.get_device_name(device)]
    else:
        where = [device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
    return key_of(
        kind="classifier-4", options=recipe_of(options, device), data=split.data, rows=split.retain.tolist(),
        normalised=[data.preset[k] for k in ("mean", "std")], weights=digest_of(*fresh.state_dict().values()),
        where=where, versions={k: v for k, v in versions().items() if k != "platform"}, stage=stage,
    )  # fmt: skip


def given_original(name: str, data: ImageData, split: Split, allow_pickle: bool = False) -> Original:
    """The original that is given: a run folder, a .safetensors file, or a transformers folder or hub id.

    Raises ModelError if it is none, its classes or channels are not the data's, or it has been made to forget already;
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
    strange = sorted({*facts.training} - {*RECIPE})
    if strange:
        raise ModelError(f"{path} is damaged: it names {', '.join(strange)}, which training has no options for")
    from_mapping(TrainOptions, facts.training, str(path))
    if facts.channels != data.channels:
        raise ModelError(f"{path} takes pictures of {facts.channels} channels, {data.name} has {data.channels}")
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
        raise ModelError(f"{where} knows {len(facts.classes)} classes, but {data.name} has {len(data.classes)}")
    other = None if has_default_labels(facts.classes) else first_label_mismatch(facts.classes, data.classes)
    if other is not None:
        raise ModelError(
            f"{where} has a class {other[0]!r} where {data.name} has {other[1]!r}: they must have the same classes in "
            "the same order (name the data's folders as the model does, or mend id2label in the model's config.json)"
        )


def _unverified_claims(name: str, model: nn.Module, classes: Sequence[str], data: ImageData) -> Iterator[str]:
    """What nobody can check of a model that others trained."""
    yield f"what {name} was trained on is not known: it may never have seen the forget set, or have seen the test"
    if has_default_labels(classes):
        yield f"{name} does not name its classes: that they come in the order of {data.name}'s is taken on trust"
    if normalize_for(model, data) is data:
        yield f"{name} has no image processor that tells the mean and deviation of its pixels: it gets {data.name}'s"
