"""CLIP without training: is an image nearer to the concept's text than to the anchor's and to a neutral one?

It knows any concept that has a name. Its probabilities over the texts are those of a zero-shot classifier (Radford et
al. 2021, section 3.1).
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


class ClipDetector:
    """Compares the probabilities of texts.

    Args:
        model: Both encoders.
        subjects: The concepts; each is an attribute of its own, whose labels are its name and its anchor.
    """

    name = "clip"
    threshold, unit = 0.0, "probability minus the largest other probability"
    prompt_match = None

    def __init__(self, model: ClipModel, subjects: Sequence[Subject]) -> None:
        self.model, self.version = model, model.version
        self.texts = {each.name: texts_of(each) for each in subjects}
        self.labels: Mapping[str, Sequence[str]] = labels_by_concept(subjects)

    @property
    def sha256(self) -> str:
        """Of the model's weights."""
        return self.model.sha256

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


def texts_of(subject: Subject) -> list[str]:
    """The texts among which an image is classified: the concept's, its anchor's if it has one, and the neutral one."""
    concept = f"a photo of {subject.phrase or subject.name}"
    anchor = [f"a photo of {subject.anchor_phrase or subject.anchor}"] if subject.anchor else []
    return [concept, *anchor, NEUTRAL]


def load(inputs: DetectorInputs) -> ClipDetector:
    """The detector with the CLIP model of its argument, a hub id or folder (default: that of the inputs).

    Raises:
        DataError: The model cannot be loaded.
    """
    named = ClipModel(inputs.argument, device=inputs.device) if inputs.argument else inputs.clip
    model = named or ClipModel(device=inputs.device)
    model.load()
    return ClipDetector(model, inputs.subjects)
