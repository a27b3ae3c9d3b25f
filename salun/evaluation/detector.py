"""What a detector is, what it looks at and gives; `salun.detectors.DETECTORS` lists those there are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from salun.detectors import DETECTORS
from salun.errors import ConfigError
from salun.evaluation.lazy_images import LazyImages, joined
from salun.options import entry_of
from salun.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.evaluation.clip_model import ClipModel

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A concept, as a detector needs to know it.

    Args:
        name, anchor: The concept and what is shown in its place; an anchor of None is the empty prompt.
        attribute: Of the model's vocabulary; None for a model without one.
        preset: Name of the concept's preset, None for free text.
        phrase, anchor_phrase: Prompts that say nothing but the concept and the anchor ("" for the empty prompt).
        neighbors: Phrases for what is near the concept and is not it.
        nouns: Other things, among which a detector may look for neighbors where none are named.
    """

    name: str
    anchor: str | None = None
    attribute: str | None = None
    preset: str | None = None
    phrase: str = ""
    anchor_phrase: str = ""
    neighbors: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Samples:
    """Images that a detector is to look at, and what they were made from.

    Args:
        images: uint8 (n, H, W, 3); or `LazyImages` of one size, from which a slice gives such an array.
        latents: float32 (n, c, h, w), scaled by the VAE's factor.
        prompts: (n,), the prompts that they were sampled from.
        compare_prompts: Whether to decide if each image shows what its prompt says (`Detector.prompt_match`).
    """

    images: Any
    latents: Tensor
    prompts: Sequence[str]
    compare_prompts: bool = False
    _computed: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def computed(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What several detectors make of the images alike, computed once for each key."""
        if key not in self._computed:
            self._computed[key] = compute()
        value: T = self._computed[key]
        return value

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Samples:
        """Those of some rows."""
        index = list(range(len(self)))[rows] if isinstance(rows, slice) else list(rows)
        images = self.images.rows(index) if isinstance(self.images, LazyImages) else self.images[index]
        return replace(self, images=images, latents=self.latents[index], prompts=[self.prompts[i] for i in index])

    @classmethod
    def cat(cls, parts: Sequence[Samples]) -> Samples:
        """All of them, of at least one part; no image is copied."""
        import torch

        latents = torch.cat([part.latents for part in parts])
        prompts = [prompt for part in parts for prompt in part.prompts]
        return cls(joined([part.images for part in parts]), latents, prompts)


def clip_embeddings(samples: Samples, model: ClipModel, progress: Progress = silent) -> np.ndarray:
    """CLIP's embeddings of the images, float32 (n, d), computed once for all detectors by the same model."""

    def embed() -> np.ndarray:
        return model.embed_images(samples.images, progress, len(samples))

    return samples.computed(f"clip {model.sha256}", embed)


@dataclass(frozen=True)
class Target:
    """Where a detector's scores show a concept.

    Args:
        attribute: Key of `Detection.scores`.
        label, anchor: Columns there; None for an anchor that cannot be detected.
    """

    attribute: str
    label: int
    anchor: int | None = None


@dataclass(frozen=True, eq=False)
class Detection:
    """What a detector sees in n images.

    Args:
        scores: Attribute → float32 (n, labels); a label is detected where its score reaches `threshold`.
        threshold: In the unit of the scores.
        valid: bool (n,), whether each image is of the kind that the detector knows; None where it cannot say. Nothing
            is detected in an invalid image.
        features: float32 (n, d), for Fréchet distances; None where the detector has none.
        adjustable: Whether a concept's threshold may be chosen anew on the original's images.
    """

    scores: Mapping[str, np.ndarray]
    threshold: float
    valid: np.ndarray | None = None
    features: np.ndarray | None = None
    adjustable: bool = False

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
        prompt_match: The attribute whose only label says that an image shows what its prompt says; None where the
            detector cannot tell.
    """

    name: str
    version: str
    sha256: str
    labels: Mapping[str, Sequence[str]]
    threshold: float
    unit: str
    prompt_match: str | None

    def target(self, subject: Subject) -> Target | None:
        """Where its scores show a concept; None for a concept that it does not know."""
        ...

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """Detect in n images."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A detector that is fitted on images of the original, of which it is known what they show, before it detects."""

    def fit(self, shows: Mapping[str, Samples], others: Samples, progress: Progress = silent) -> None:
        """shows: concept → images of its prompts. others: images of other prompts."""
        ...


@dataclass(frozen=True)
class DetectorInputs:
    """What detectors are made from.

    Args:
        subjects: The concepts.
        folder: The model's own detector, if it has one.
        original: The model with its original weights (`salun.diffusion.model.protocol.DiffusionModel`); None where
            there are only images.
        device: Where to compute.
        argument: What follows the detector's name after a colon, "" for nothing.
        clip: The CLIP model of detectors that name none themselves; None for the default one.
    """

    subjects: Sequence[Subject]
    folder: Path | None = None
    original: Any = None
    device: torch.device | str = "cpu"
    argument: str = ""
    clip: ClipModel | None = None


def labels_by_concept(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """Labels of a detector whose attributes are the concepts: the concept itself, and its anchor if it has one."""
    return {each.name: [each.name, *([each.anchor] if each.anchor else [])] for each in subjects}


def target_by_concept(subject: Subject, labels: Mapping[str, Sequence[str]]) -> Target | None:
    """The target of a concept among `labels_by_concept`."""
    return Target(subject.name, 0, 1 if subject.anchor else None) if subject.name in labels else None


def facts_of(detector: Detector) -> dict[str, str | float]:
    """A detector's facts, as in `run.json`, with those in its attribute `facts` if it has that."""
    facts = {name: getattr(detector, name) for name in ("name", "version", "sha256", "threshold", "unit")}
    return {**facts, **getattr(detector, "facts", {})}


def load_detector(name: str, inputs: DetectorInputs) -> Detector:
    """The detector of this name, with its argument after a colon if it takes one.

    Raises:
        ConfigError: No detector has that name, it is not at hand, or it cannot detect a concept.
        DataError: The detector's files cannot be used.
    """
    entry, argument = entry_of(name, DETECTORS, "detector")
    load: Callable[[DetectorInputs], Detector | None] = resolve_name(entry.loads)
    detector = load(replace(inputs, argument=argument))
    missed = [each.name for each in inputs.subjects if detector is None or detector.target(each) is None]
    if detector is None or missed:
        raise ConfigError(
            f"is {name}, which cannot detect {', '.join(map(repr, missed))} in images of this model",
            option="detector",
            advice="Omit {detector}, or use {detector} self",
        )
    return detector
