"""What a detector is, which ones there are, and the choice of one that covers the concepts of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

import numpy as np

from salun.errors import ConfigError
from salun.evaluation.estimate import Unknown

if TYPE_CHECKING:
    import torch

DETECTORS = {  # name → the function that loads it, imported when it is called; in the order of preference
    "attribute": "salun.evaluation.detectors.attribute:load",
}


@dataclass(frozen=True, eq=False)
class Detection:
    """What a detector sees in n images.

    Args:
        scores: Attribute → float32 (n, labels); a label is detected where its score reaches `threshold`.
        threshold: In the unit of the scores.
        valid: bool (n,), whether each image is of the kind that the detector knows; None where it cannot say. Nothing
            is detected in an invalid image.
        features: float32 (n, d), for Fréchet distances; None where the detector has none.
    """

    scores: Mapping[str, np.ndarray]
    threshold: float
    valid: np.ndarray | None = None
    features: np.ndarray | None = None

    def shows(self, attribute: str, label: int | np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Whether a label of the attribute, or each image's label (n,), is detected, bool (n,); −1 never is."""
        scores = self.scores[attribute][rows]
        labels = np.broadcast_to(label, len(scores))
        shown: np.ndarray = (scores[np.arange(len(scores)), labels] >= self.threshold) & (labels >= 0)
        return shown


class Detector(Protocol):
    """Decides which labels images show.

    Attributes:
        name, version: As in `run.json`; the name is its key in `DETECTORS`.
        sha256: Of its weights.
        labels: Attribute → its labels.
        threshold, unit: From which score on a label counts as detected, and what a score is.
    """

    name: str
    version: str
    sha256: str
    labels: Mapping[str, Sequence[str]]
    threshold: float
    unit: str

    def covers(self, attribute: str | None, label: str) -> bool:
        """Whether it can detect a label. attribute: of the model's vocabulary; None for a model without one."""
        ...

    def detect(self, images: np.ndarray) -> Detection:
        """Detect in uint8 images (n, h, w, 3)."""
        ...


def facts_of(detector: Detector) -> dict[str, str | float]:
    """A detector's facts, as in `run.json`."""
    return {name: getattr(detector, name) for name in ("name", "version", "sha256", "threshold", "unit")}


def choose_detector(
    concepts: Sequence[tuple[str | None, str]],
    folder: Path | None,
    device: torch.device | str = "cpu",
    name: str | None = None,
) -> Detector | Unknown:
    """The detector of this name, or the first one that covers all concepts; Unknown if there is none.

    Args:
        concepts: Attribute (None for a model without a vocabulary) and label of each concept.
        folder: The model's own detector, if it has one.

    Raises:
        ConfigError: No detector has that name.
        DataError: The detector's files cannot be used.
    """
    if name is not None and name not in DETECTORS:
        raise ConfigError(f"is {name!r}, but must be one of {', '.join(DETECTORS)}", option="detector")
    for key in DETECTORS if name is None else (name,):
        load: Callable[[Path | None, torch.device | str], Detector | None] = resolve_name(DETECTORS[key])
        detector = load(folder, device)
        if detector is not None and all(detector.covers(*concept) for concept in concepts):
            return detector
    labels = ", ".join(repr(label) for _, label in concepts)
    return Unknown(f"no detector covers {labels}: look at the images")
