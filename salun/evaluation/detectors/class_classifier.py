"""A classifier that `salun classify-train` made, for concepts among its classes, such as those of a class model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salun.classification.models import Preprocessing, Pretrained, WeightFileInfo, load_model
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation.detector import DetectorInputs
from salun.evaluation.detectors.imagenet import ImageClassifier
from salun.evaluation.pretrained import Prepare
from salun.files import sha256_file
from salun.user_text import as_spelled, unquoted

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAIN = "Make one with `salun classify-train`, on the images that the model was trained on"


class ClassClassifier(ImageClassifier):
    """The likeliest class of an image, by a classifier of salun's own."""

    name = "class"


def load(inputs: DetectorInputs) -> ClassClassifier:
    """The detector with the classifier of its argument, a run folder or a file of weights.

    Raises:
        ConfigError: There is no argument.
        DataError: The file cannot be used, or does not say how its images are prepared.
    """
    if not inputs.argument:
        raise ConfigError("is class, but names no classifier", option="detector", advice="Use {detector} class:FILE")
    path = as_spelled(Path(unquoted(inputs.argument)).expanduser())
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        model, facts = load_model(file)
        digest = sha256_file(file)
    except (ModelError, OSError) as error:
        reason = error.message if isinstance(error, ModelError) else str(error)
        raise DataError(f"the classifier {inputs.argument} cannot be used: {reason}", advice=TRAIN) from error
    if reason := unusable(model, facts):
        raise DataError(f"the classifier {inputs.argument} cannot be used: {reason}", advice=TRAIN)
    assert facts.pixels is not None
    resizes = isinstance(model, Pretrained)  # its images itself
    prepare = prepared(replace(facts.pixels, size=None) if resizes else facts.pixels, facts.channels)
    version = "transformers" if resizes else facts.architecture
    return ClassClassifier(model.to(inputs.device).eval(), prepare, facts.classes, version, digest, inputs.device)


def unusable(model: nn.Module, facts: WeightFileInfo) -> str:
    """Why a classifier cannot tell the classes of images; "" if it can."""
    pixels = facts.pixels
    if facts.role == "unlearned":
        return "it has unlearned some of what it is to recognize"
    if pixels is None or pixels.mean is None or pixels.std is None:
        return "it does not say how its images are prepared"
    if isinstance(model, Pretrained):
        labels = getattr(model.model.config, "num_labels", None)
        return "" if labels == len(facts.classes) else f"it has {labels} outputs and {len(facts.classes)} classes"
    if pixels.size is None or len(pixels.size) != 2:
        return "it does not say how large its images are"
    return "" if facts.channels in (1, 3) else f"it takes images of {facts.channels} channels"


def prepared(pixels: Preprocessing, channels: int) -> Prepare:
    """What a classifier takes: images of its size and number of channels, normalized by its mean and deviation.

    Args:
        pixels: A size of None keeps that of the images.
    """
    import torch
    from torch.nn import functional as F

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    size = pixels.size

    def prepare(image: np.ndarray) -> Tensor:
        x = torch.tensor(image).permute(2, 0, 1).float() / 255
        if channels == 1:
            x = x.mean(0, keepdim=True)
        if size is not None and tuple(x.shape[1:]) != size:
            x = F.interpolate(x[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return (x - mean) / std

    return prepare
