"""What a run will do: `None` made a number, from the data set, the original's own training, or the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from salun.classification.data import EMBEDDED, ImageData
from salun.classification.methods import METHODS
from salun.classification.methods.distillation import check_epochs
from salun.classification.methods.fisher import check_alpha
from salun.classification.options import UnlearnOptions
from salun.classification.search import check_search
from salun.classification.splits import Split
from salun.compute.device import DTYPES, pick_dtype
from salun.errors import ConfigError

TRAINING = ("model", "train_epochs", "train_lr", "train_batch_size", "augment")
RECIPE = (*TRAINING, "momentum", "weight_decay", "dtype", "deterministic", "seed")  # all that an original depends on


def recipe_of(options: UnlearnOptions, device: torch.device) -> dict[str, Any]:
    """How a model is trained by settled options, for its file; the dtype as it is on this device."""
    dtype = next(name for name, kind in DTYPES.items() if kind == pick_dtype(options.dtype, device))
    return {**{name: getattr(options, name) for name in RECIPE}, "dtype": dtype}


def known_recipe(training: Mapping[str, Any] | None) -> bool:
    """Whether a file tells all of how its model was trained, so that Retrain can be trained likewise."""
    return training is not None and all(name in training for name in RECIPE)


def resolve_options(
    options: UnlearnOptions, data: ImageData, split: Split, training: dict[str, Any] | None = None
) -> UnlearnOptions:
    """The options without a `None`, but for `original` and what the data or the method has no use for.

    split: the run's; SSD's α depends on how much is forgotten. training: how the original that is given was trained.
    Raises ConfigError for a `train_…` option, model or augmentation that contradicts it, an option that the method
    cannot follow, or a search that has nothing to go by.
    (Momentum, weight decay, dtype and seed are those of unlearning; Retrain takes the original's.)
    """
    preset = data.preset
    own = {"model": preset["model"], "augment": preset["augment"]}
    own |= {f"train_{name}": value for name, value in preset["train"].items()}
    for name, value in ((name, value) for name, value in (training or {}).items() if name in TRAINING):
        wish = getattr(options, name)
        if wish is not None and wish != value:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {wish!r}, but the --original was trained with {value!r}: leave it out"
            )
        own[name] = value
    chosen = {name: value for name, value in own.items() if getattr(options, name) is None}
    method = METHODS[options.method]
    for name in ("epochs", "lr", "mask"):
        value = getattr(method, name)
        if getattr(options, name) is None:
            chosen[name] = value
        elif value is None:
            raise ConfigError(f"--{name} {getattr(options, name)}: the method {method.title} has none; leave it out")
    if options.ssd_alpha is None and len(split.forget):
        chosen["ssd_alpha"] = round(len(split.train) / len(split.forget) / 2, 4)
    if options.batch_size is None:
        chosen["batch_size"] = preset["train"]["batch_size"]
    full = replace(options, **chosen)
    if full.method == "scrub":
        check_epochs(full.epochs, full.max_epochs)
    if full.method == "ssd" and full.ssd_alpha is not None and len(split.forget):
        check_alpha(full.ssd_alpha, len(split.forget), len(split.train))
    if full.search:
        check_search(full, data, split)
    return full


def why_no_retrain(options: UnlearnOptions, training: dict[str, Any] | None) -> str | None:
    """Why Retrain is not put beside this run, None if it is. Raises ConfigError if it was asked for and cannot be.

    training: of the original that is given, None if none is.
    """
    if training is not None and not known_recipe(training):
        if options.retrain == "yes" or options.method == "retrain":
            raise ConfigError(
                f"how {options.original} was trained is not known, so it cannot be trained again without the forget "
                "set: train an original by `salun classify-train`"
            )
        return "how the original was trained is not known"
    if options.method == "retrain":
        return "this is Retrain itself"
    if options.retrain == "no" or (options.retrain == "auto" and options.data not in EMBEDDED):
        return "Retrain was not asked for: add --retrain yes"
    return None
