"""What each command on classifiers does, in order, and what it costs: behind progress, time left and dry runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from salun.classification.masks import BATCH
from salun.classification.search import FURTHER
from salun.methods import METHODS
from salun.options import BY_GRADIENT
from salun.progress import Stage, StageCost, merged

if TYPE_CHECKING:
    from salun.classification.data import ImageData
    from salun.classification.options import TaskOptions
    from salun.classification.splits import Split
    from salun.classification.unlearn_options import CompareOptions, UnlearnOptions

READ = 3  # passes over the images that a method without epochs takes, about
LATER = FURTHER + 2  # values that a search may try after its first round
RESNET18_SECONDS = 0.04  # of an image of 32×32 in training on a core, by its operations from ResNet-20's 3 ms


def training_stages(recipe: UnlearnOptions, split: Split) -> list[StageCost]:
    """The stages of `train`. recipe: its options, resolved."""
    rows = sum(map(len, (split.train, split.validation, split.test)))
    return [_training(Stage.TRAINING, recipe, len(split.train)), StageCost(Stage.EVALUATING, rows, forward=rows)]


def unlearning_stages(
    options: UnlearnOptions, recipe: UnlearnOptions, split: Split, trains: bool, retrains: bool
) -> list[StageCost]:
    """The stages of `unlearn`; that of a model which comes from the cache ends as the next one begins.

    Args:
        options, recipe: As in `ExperimentSetup`.
        trains: Whether the original is trained, rather than given.
        retrains: Whether the run is compared with Retrain.
    """
    method, train, forget = METHODS["classification"][options.method], len(split.train), len(split.forget)
    relearning = StageCost(Stage.RELEARNING, options.relearn, backward=options.relearn * _size(options.batch_size))
    stages = []
    if trains:
        stages.append(_training(Stage.TRAINING, recipe, train))
    if options.search:
        rounds, values = len(method.factors), len(method.factors) + LATER
        stages.append(StageCost(Stage.SEARCHING, rounds, backward=rounds * passes_of(options, split), most=values))
    if method.trains and options.mask in BY_GRADIENT:
        compared = min(forget, len(split.retain)) if options.mask == "saliency-ratio" else 0
        steps = math.ceil(forget / BATCH) + math.ceil(compared / BATCH)
        stages.append(StageCost(Stage.SALIENCY, steps, backward=forget + compared))
    stages += [_unlearning(options, train, len(split.retain)), relearning]
    if retrains:
        stages += [_training(Stage.RETRAINING, recipe, len(split.retain)), relearning]
    return merged(stages)


def comparison_stages(options: CompareOptions, rows: Sequence[tuple[UnlearnOptions, Split]]) -> list[StageCost]:
    """The stages of `compare`, whose steps are jobs, and in the search values that jobs try.

    Args:
        rows: The resolved options of each row of the table, and their split, at one seed.
    """
    (recipe, split), each = rows[0], [passes_of(*row) for row in rows]
    epochs, train, retain = recipe.train_epochs or 1, len(split.train), len(split.retain)
    seeds, exact = options.seeds, 2 if options.noise_floor else 1
    stages = [StageCost(Stage.RETRAINING, seeds * exact, backward=seeds * epochs * (train + exact * retain))]
    if options.search:
        searching = min(seeds, options.search_seeds)
        factors = [len(METHODS["classification"][of.method].factors) for of, _ in rows]
        values, passes = sum(factors), sum(n * of for n, of in zip(factors, each, strict=True))
        most = searching * (values + LATER * len(rows))
        stages.append(StageCost(Stage.SEARCHING, searching * values, backward=searching * passes, most=most))
    return [*stages, StageCost(Stage.UNLEARNING, seeds * len(rows), backward=seeds * sum(each), guessed=True)]


def slow_training(options: TaskOptions, data: ImageData, split: Split) -> list[str]:
    """A note where a model trains for hours on a CPU, with the names of faster ones. options: resolved."""
    if data.device.type != "cpu" or options.model != "resnet18":
        return []
    pixels = data.images.shape[2] * data.images.shape[3] / 32**2
    hours = RESNET18_SECONDS * pixels * len(split.train) * (options.train_epochs or 1) / torch.get_num_threads() / 3600
    if hours < 1:
        return []
    return [f"{data.name}: resnet18 takes about {hours:,.0f} h to train on this CPU; resnet20 and small are faster"]


def passes_of(options: TaskOptions, split: Split) -> int:
    """About how many images one unlearning trains on or reads."""
    if options.method == "retrain":
        return (options.train_epochs or 1) * len(split.retain)
    return (options.epochs or READ) * len(split.train)


def _unlearning(options: UnlearnOptions, train: int, retain: int) -> StageCost:
    """That of the method, which may read but a part of the images in each epoch."""
    if options.method == "retrain":
        return _training(Stage.RETRAINING, options, retain)
    epochs = options.epochs or READ
    steps = epochs * math.ceil(train / _size(options.batch_size))
    return StageCost(Stage.UNLEARNING, steps, backward=epochs * train, guessed=True)


def _training(stage: Stage, options: UnlearnOptions, images: int) -> StageCost:
    epochs = options.train_epochs or 1
    steps = epochs * math.ceil(images / _size(options.train_batch_size))
    return StageCost(stage, steps, backward=epochs * images, guessed=True)


def _size(batch_size: int | None) -> int:
    return batch_size or 1
