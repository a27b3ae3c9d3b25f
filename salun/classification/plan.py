"""Resolves options: replaces `None` by a value of the data set, of the original's own training, or of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from salun.classification.data import EMBEDDED, ImageData
from salun.classification.options import TaskOptions
from salun.classification.search import check_search
from salun.classification.splits import Split
from salun.classification.unlearn_options import UnlearnOptions
from salun.compute.device import DTYPES, pick_dtype
from salun.errors import ConfigError
from salun.methods import METHODS

TRAINING = ("model", "train_epochs", "train_lr", "train_batch_size", "augment")
RECIPE = (*TRAINING, "momentum", "weight_decay", "dtype", "deterministic", "seed")  # what an original depends on


def recipe_of(options: TaskOptions, device: torch.device) -> dict[str, Any]:
    """The options that a model is trained with, for its file; the dtype as resolved on this device."""
    dtype = next(name for name, kind in DTYPES.items() if kind == pick_dtype(options.dtype, device))
    return {**{name: getattr(options, name) for name in RECIPE}, "dtype": dtype}


def forget_of(options: TaskOptions, data: ImageData) -> str:
    """What to forget: the option, or the data set's own task, in which there is something to forget."""
    return options.forget or str(data.preset.get("forget", "random:0.1"))


def known_recipe(training: Mapping[str, Any] | None) -> bool:
    """Whether a file holds all options that its model was trained with, which Retrain needs."""
    return training is not None and all(name in training for name in RECIPE)


def resolve_options(
    options: UnlearnOptions, data: ImageData, split: Split, training: dict[str, Any] | None = None
) -> UnlearnOptions:
    """The options without a `None`, except for `original` and what the data or the method has no use for.

    Momentum, weight decay, dtype and seed are those of unlearning; Retrain takes the original's.

    Args:
        split: The run's; what a method resolves may depend on how much is forgotten.
        training: How the original that is given was trained.

    Raises:
        ConfigError: A `train_…` option, model or augmentation contradicts `training`, the method cannot follow an
            option, or a search is impossible.
    """
    preset, method = data.preset, METHODS["classification"][options.method]
    known = {"model": preset["model"], "augment": preset["augment"]}
    known |= {f"train_{name}": value for name, value in preset["train"].items()}
    for name in TRAINING if training else ():
        if training is not None and name in training:
            _check_agrees(name, getattr(options, name), training[name])
            known[name] = training[name]
    known |= {"batch_size": preset["train"]["batch_size"], **method.defaults}
    if method.takes_mask:
        known["mask"] = method.mask
    for name in ("epochs", "lr", "mask"):
        if name not in known and getattr(options, name) is not None:
            raise ConfigError(
                f"is {getattr(options, name)}, but the method {method.title} has none", option=name, advice="Omit it"
            )
    if method.whole_classes:
        _check_whole_classes(method.title, data, split)
    chosen = {name: value for name, value in known.items() if getattr(options, name) is None}
    full = replace(options, **chosen)
    full = replace(full, **method.resolved(full, split))
    if full.search:
        check_search(full, data, split)
    return full


def _check_whole_classes(title: str, data: ImageData, split: Split) -> None:
    """Raises ConfigError for a forget set of whose classes other images are retained."""
    labels = data.labels.cpu()
    if torch.isin(labels[split.forget], labels[split.retain]).any():
        raise ConfigError(
            f"is {split.forgetting}, but {title} forgets whole classes only, and other images of these are retained",
            option="forget",
            advice="Use class:NAME or another {method}",
        )


def _check_agrees(name: str, value: Any, trained: Any) -> None:
    """Raises ConfigError for an option that contradicts how the original was trained."""
    if value is not None and value != trained:
        raise ConfigError(f"is {value!r}, but the original was trained with {trained!r}", option=name, advice="Omit it")


def why_no_retrain(options: UnlearnOptions, training: dict[str, Any] | None) -> str | None:
    """Why there is no Retrain to compare with; None if there is.

    training: of the original that is given, None if none is. Raises ConfigError where it is required and impossible.
    """
    if training is not None and not known_recipe(training):
        if options.retrain == "yes" or options.method == "retrain":
            raise ConfigError(
                f"the training options of {options.original} are not known, so it cannot be trained again without the "
                "forget set",
                advice="Train an original by `salun classify-train`",
            )
        return "the original's training options are not known"
    if options.method == "retrain":
        return "this is Retrain itself"
    if options.retrain == "no" or (options.retrain == "auto" and options.data not in EMBEDDED):
        return "Retrain is not trained unless the option retrain is yes"
    return None
