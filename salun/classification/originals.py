"""The model that is to forget: given, or trained here and kept in the cache. Retrain comes about the same way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from salun.cache import Cache, key_of
from salun.classification.data import ImageData
from salun.classification.methods.retaining import retrain
from salun.classification.models import ARCHITECTURES, Facts, load_model, new_model, stock_model
from salun.classification.options import UnlearnOptions
from salun.classification.plan import TRAINING
from salun.classification.splits import Split
from salun.classification.task import Task
from salun.device import pick_dtype
from salun.errors import DataError, ModelError
from salun.progress import Progress

DECISIVE = (*TRAINING, "momentum", "weight_decay", "dtype", "deterministic", "seed")


@dataclass(frozen=True, eq=False)
class Original:
    """A trained model and what its file says of it.

    seconds: its training took, None where nobody knows. history: as `Task.history`. notes: what a user should know.
    """

    model: nn.Module
    facts: Facts
    seconds: float | None = None
    history: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def trained(
    options: UnlearnOptions, data: ImageData, split: Split, cache: Cache, progress: Progress, stage: str
) -> Original:
    """A model trained from scratch on the split's retain rows by settled options; from the cache if it was before.

    An original has a split in which nothing is forgotten yet, so that retain is all of train; Retrain one with a forget
    set. Both begin at the same weights.
    """
    device = data.images.device
    wanted = {name: getattr(options, name) for name in DECISIVE}
    key = key_of(
        kind="classifier-3", options=wanted, data=split.data, normalised=[data.preset[k] for k in ("mean", "std")],
        rows=split.retain.tolist(), device=device.type, torch=torch.__version__,
    )  # fmt: skip
    assert options.model is not None
    fresh = partial(new_model, options.model, data.channels, len(data.classes), options.seed)
    model = fresh().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = Facts(
        options.model, data.channels, data.classes, stage, split.base, split.digest,
        {name: getattr(options, name) for name in TRAINING},
    )  # fmt: skip
    kept = cache.get(key)
    if kept is not None:
        losses = kept.pop("history")
        seconds = float(kept.pop("seconds"))
        model.load_state_dict(kept)
        return Original(model.eval(), facts, seconds, [(int(epoch), None, loss) for epoch, loss in losses.tolist()])
    task = Task(model, data, split, options, fresh, progress, pick_dtype(options.dtype, device))
    began = time.perf_counter()
    retrain(task, stage)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    losses = torch.tensor([(epoch, loss) for epoch, _, loss in task.history], dtype=torch.float64)
    told = {"seconds": torch.tensor(seconds, dtype=torch.float64), "history": losses}
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    cache.put(key, {**weights, **told})
    return Original(model, facts, seconds, task.history)


def given_original(name: str, data: ImageData, split: Split) -> Original:
    """The original that `--original` names: a run folder, a .safetensors file, or a transformers folder or hub id.

    Raises ModelError if it is none, its classes or channels are not the data's, or it has been made to forget already;
    DataError if it was trained on another split.
    """
    path = Path(name).expanduser()
    if (path / "model.safetensors").is_file() and not (path / "config.json").is_file():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        model, facts = load_model(path)
    else:
        model, classes = stock_model(name)
        note = f"what {name} was trained on is not known: it may never have seen the forget set, or have seen the test"
        facts = Facts(name, 3, classes, "original", split.base, training={"model": name})
        return Original(model, _checked(facts, name, data), notes=(note,))
    _checked(facts, str(path), data)
    if facts.channels != data.channels:
        raise ModelError(f"{path} takes pictures of {facts.channels} channels, {data.name} has {data.channels}")
    if facts.role != "original":
        raise ModelError(f"{path} is no original but {facts.role}: name a model made by `salun classify-train`")
    if facts.base != split.base:
        raise DataError(
            f"{path} was trained on another split of the data, or on other data: repeat the --data, --split-seed, "
            "--test-share and --validation-share that it was trained with"
        )
    return Original(model, facts)


def _checked(facts: Facts, where: str, data: ImageData) -> Facts:
    if len(facts.classes) != len(data.classes):
        raise ModelError(f"{where} knows {len(facts.classes)} classes, but {data.name} has {len(data.classes)}")
    if facts.architecture in ARCHITECTURES and facts.classes != data.classes:
        other = next((a, b) for a, b in zip(facts.classes, data.classes, strict=True) if a != b)
        raise ModelError(f"{where} has a class {other[0]!r} where {data.name} has {other[1]!r}")
    return facts
