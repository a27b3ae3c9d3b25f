"""What unlearning in a classifier does, in order, and what it costs: behind progress and time left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from salun.classification.masks import BATCH
from salun.classification.search import FURTHER
from salun.methods import METHODS
from salun.progress import Stage, StageCost, merged

if TYPE_CHECKING:
    from salun.classification.splits import Split
    from salun.classification.unlearn_options import UnlearnOptions

READ = 3  # passes over the images that a method without epochs takes, about
LATER = FURTHER + 2  # values that a search may try after its first round


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
        of_all = rounds * (options.epochs or READ) * train
        stages.append(StageCost(Stage.SEARCHING, rounds, backward=of_all, most=values))
    if method.trains and options.mask in ("saliency", "shuffled"):
        stages.append(StageCost(Stage.SALIENCY, math.ceil(forget / BATCH), backward=forget))
    stages += [_unlearning(options, train, len(split.retain)), relearning]
    if retrains:
        stages += [_training(Stage.RETRAINING, recipe, len(split.retain)), relearning]
    return merged(stages)


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
