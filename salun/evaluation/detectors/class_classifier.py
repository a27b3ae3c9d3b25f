"""A classifier that `salun classify-train` made, for concepts among its classes, such as those of a class model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salun.classification.models import Preprocessing, Pretrained, load_model
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation.detector import DetectorInputs
from salun.evaluation.detectors.imagenet import ImageClassifier
from salun.evaluation.pretrained import Prepare
from salun.files import sha256_file
from salun.user_text import as_spelled

if TYPE_CHECKING:
    from torch import Tensor

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
        raise ConfigError("class needs a classifier: class:FILE", option="detector", advice=TRAIN)
    path = as_spelled(Path(inputs.argument).expanduser())
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        model, facts = load_model(file)
        digest = sha256_file(file)
    except (ModelError, OSError) as error:
        raise DataError(f"the classifier {inputs.argument} cannot be used: {error}", advice=TRAIN) from error
    pixels, channels = facts.pixels, facts.channels
    if pixels is None or any(len(values or ()) not in (1, channels) for values in (pixels.mean, pixels.std)):
        raise DataError(f"the classifier {inputs.argument} does not say how its images are prepared", advice=TRAIN)
    resized = replace(pixels, size=None) if isinstance(model, Pretrained) else pixels
    network = model.to(inputs.device).eval()
    return ClassClassifier(
        network, prepared(resized, channels), facts.classes, facts.architecture, digest, inputs.device
    )


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
