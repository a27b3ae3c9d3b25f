"""CLIP without training: is an image nearer to the concept's text than to others, those of its anchor and neighbors?

Without neighbors, what is near the concept would be taken for it: no other text fits an image of a wolf as well as that
of the concept “dog”. CLIP knows any concept that has a name. Its probabilities over the texts are those of a zero-shot
classifier (Radford et al. 2021, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import (
    Detection,
    DetectorInputs,
    Samples,
    Subject,
    Target,
    clip_embeddings,
    labels_by_concept,
    target_by_concept,
)
from salun.evaluation.detectors.attribute import margins
from salun.progress import Progress, silent

NEUTRAL = "a photo"
NEIGHBORS = 8  # at most, of those that CLIP finds itself


class ClipDetector:
    """Compares the probabilities of texts.

    Args:
        model: Both encoders.
        subjects: The concepts; each is an attribute of its own, whose labels are its name and its anchor.

    Raises DataError if the model cannot be loaded.
    """

    name = "clip"
    threshold, unit = 0.0, "probability minus the largest other probability"
    prompt_match = None

    def __init__(self, model: ClipModel, subjects: Sequence[Subject]) -> None:
        self.model, self.version = model, model.version
        self.texts = {each.name: texts_of(each, neighbors_of(each, model)) for each in subjects}
        self.labels: Mapping[str, Sequence[str]] = labels_by_concept(subjects)

    @property
    def sha256(self) -> str:
        """Of the model's weights."""
        return self.model.sha256

    @property
    def facts(self) -> dict[str, str]:
        """The texts that are compared for each concept."""
        return {"texts": "; ".join(f"{name}: {', '.join(texts)}" for name, texts in self.texts.items())}

    def target(self, subject: Subject) -> Target | None:
        """Its own attribute of the concept's name."""
        return target_by_concept(subject, self.labels)

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """The likeliest of each concept's texts; the features are the embeddings."""
        images = clip_embeddings(samples, self.model, progress)
        scores = {}
        for name, texts in self.texts.items():
            logits = self.model.scale * torch.from_numpy(images @ self.model.embed_texts(texts).T)
            scores[name] = margins(logits.softmax(1)).numpy()[:, : len(self.labels[name])].astype(np.float32)
        return Detection(scores, self.threshold, features=images)


def texts_of(subject: Subject, neighbors: Sequence[str] = ()) -> list[str]:
    """The texts among which an image is classified: of the concept, its anchor and its neighbors, and the neutral one.

    Args:
        neighbors: Phrases.
    """
    anchor = [subject.anchor_phrase or subject.anchor] if subject.anchor else []
    return [*(f"a photo of {each}" for each in (subject.phrase or subject.name, *anchor, *neighbors)), NEUTRAL]


def neighbors_of(subject: Subject, model: ClipModel) -> list[str]:
    """A concept's neighbors: those that are named, or else the nouns that CLIP's text encoder finds nearest to it."""
    if subject.neighbors or not subject.nouns:
        return list(subject.neighbors)
    embedded = model.embed_texts([f"a photo of {each}" for each in (subject.phrase or subject.name, *subject.nouns)])
    centered = embedded - embedded[1:].mean(0)  # all embeddings of texts share a large common part
    near = centered[1:] @ centered[0] / np.linalg.norm(centered[1:], axis=1)
    return [subject.nouns[i] for i in np.argsort(-near, kind="stable")[:NEIGHBORS]]


def load(inputs: DetectorInputs) -> ClipDetector:
    """The detector with the CLIP model of its argument, a hub id or folder (default: that of the inputs).

    Raises:
        DataError: The model cannot be loaded.
    """
    named = ClipModel(inputs.argument, device=inputs.device) if inputs.argument else inputs.clip
    model = named or ClipModel(device=inputs.device)
    model.load()
    return ClipDetector(model, inputs.subjects)
