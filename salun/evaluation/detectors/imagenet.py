"""An image classifier of transformers: for concepts that are among its labels, such as ImageNet's 1,000 classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.transformers_folder import ModelFiles, folder_of, image_processor, load_model
from salun.errors import ModelError
from salun.evaluation.detector import Detection, DetectorInputs, Samples, Subject, Target
from salun.evaluation.detectors.attribute import margins
from salun.evaluation.pretrained import RESNET, REVISIONS, batches, loading, version_of, weights_hash
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    import torch

FILES = ModelFiles("image classifier")
CLASS = "class"  # the attribute


class ImageClassifier:
    """The likeliest class of an image.

    Args:
        model: A classifier of transformers.
        processor: Its image processor.
        classes: The names of its labels; one may have several, separated by commas.
        version, sha256: The model's name with its revision, and the hash of its weights.
    """

    name = "imagenet"
    threshold, unit = 0.0, "logit minus the largest other logit"
    prompt_match = None

    def __init__(
        self, model: Any, processor: Any, classes: Sequence[str], version: str, sha256: str,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.model, self.processor, self.device = model, processor, device
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
            for pixels in batches(samples.images, self.processor, self.device):
                scores.append(margins(self.model(pixel_values=pixels).logits).cpu().numpy())
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
    from transformers import AutoModelForImageClassification as Auto

    name = inputs.argument or RESNET
    with loading():
        folder = folder_of(name, FILES, REVISIONS.get(name))
        model = load_model(name, folder, FILES, Auto, partial(Auto.from_config, trust_remote_code=False))
        names: dict[Any, Any] = model.config.id2label
        if sorted(names) != list(range(len(names))) or not all(isinstance(each, str) for each in names.values()):
            raise ModelError(f"the id2label in the config.json of {name!r} must name the classes from 0 up")
        processor = image_processor(folder, name, FILES)
    classes = [names[i] for i in range(len(names))]
    model = model.to(inputs.device)
    return ImageClassifier(model, processor, classes, version_of(name), weights_hash(folder), inputs.device)
