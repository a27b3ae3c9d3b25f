"""An image classifier of transformers or timm, for concepts among its labels, such as ImageNet's 1,000 classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.transformers_folder import ModelFiles, folder_of, image_processor, load_model, read_config
from salun.errors import ModelError
from salun.evaluation.detector import Detection, DetectorInputs, Samples, Subject, Target
from salun.evaluation.detectors.attribute import margins
from salun.evaluation.pretrained import (
    RESNET,
    REVISIONS,
    Network,
    Prepare,
    batches,
    by_processor,
    loading,
    version_of,
    weights_hash,
)
from salun.evaluation.timm_model import is_timm, load_timm
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = ModelFiles("image classifier")
CLASS = "class"  # the attribute


class ImageClassifier:
    """The likeliest class of an image.

    Args:
        network: As `Network`, with a logit for each class.
        prepare: As `Prepare`, for that network.
        classes: The names of its labels; one may have several, separated by commas.
        version, sha256: The model's name with its revision, and the hash of its weights.
    """

    name = "imagenet"
    threshold, unit = 0.0, "logit minus the largest other logit"
    prompt_match = None

    def __init__(
        self, network: Network, prepare: Prepare, classes: Sequence[str], version: str, sha256: str,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.network, self.prepare, self.device = network, prepare, device
        self.version, self.sha256 = version, sha256
        self.labels: Mapping[str, Sequence[str]] = {CLASS: list(classes)}

    def target(self, subject: Subject) -> Target | None:
        """The classes of the concept and its anchor; None for a concept that no class has, or several have."""
        label = class_of(self.labels[CLASS], subject.name)
        anchor = class_of(self.labels[CLASS], subject.anchor) if subject.anchor else None
        return None if label is None else Target(CLASS, label, anchor)

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """The likeliest class of each image."""
        import torch

        scores = [np.empty((0, len(self.labels[CLASS])), np.float32)]
        done = 0
        with torch.no_grad():
            for pixels in batches(samples.images, self.prepare, self.device):
                scores.append(margins(self.network(pixels)).cpu().numpy())
                done += len(pixels)
                progress(Event(Stage.DETECTING, done, len(samples)))
        return Detection({CLASS: np.concatenate(scores)}, self.threshold)


def class_of(classes: Sequence[str], name: str) -> int | None:
    """The index of the only class of this name, None without one.

    Of a class such as "tench, Tinca tinca" each name counts. Case does not, nor do blanks, dashes and underscores.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]+", " ", text).strip().casefold()

    matches = [i for i, each in enumerate(classes) if plain(name) in {plain(part) for part in (each, *each.split(","))}]
    return matches[0] if len(matches) == 1 else None


def load(inputs: DetectorInputs) -> ImageClassifier:
    """The detector with the classifier of its argument, a hub id or folder (default: `RESNET`).

    Raises:
        DataError: The model cannot be loaded, or does not name its classes.
    """
    name = inputs.argument or RESNET
    with loading():
        folder = folder_of(name, FILES, REVISIONS.get(name))
        config = read_config(folder / "config.json", name, FILES)
        if is_timm(config):
            network, prepare, classes = load_timm(name, folder, FILES, config, inputs.device)
        else:
            network, prepare, classes = _of_transformers(name, folder, inputs.device)
    return ImageClassifier(network, prepare, classes, version_of(name, folder), weights_hash(folder), inputs.device)


def _of_transformers(name: str, folder: Path, device: torch.device | str) -> tuple[Network, Prepare, list[str]]:
    """The network, preprocessing and classes of a folder of transformers. Raises ModelError."""
    from transformers import AutoModelForImageClassification as Auto

    model = load_model(name, folder, FILES, Auto, partial(Auto.from_config, trust_remote_code=False)).to(device)
    names: dict[Any, Any] = model.config.id2label
    if sorted(names) != list(range(len(names))) or not all(isinstance(each, str) for each in names.values()):
        raise ModelError(f"the id2label in the config.json of {name!r} must name the classes from 0 up")
    prepare = by_processor(image_processor(folder, name, FILES))

    def network(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixel_values=pixels).logits
        return logits

    return network, prepare, [names[i] for i in range(len(names))]
