"""A small classifier of image attributes, in the model's own folder.

The folder holds `detector.json` (attributes with their labels, resolution, channels) and `detector.safetensors`; the
model's `salun.yaml` names it. The classifier also decides whether an image is valid at all, so that destruction is not
mistaken for forgetting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.errors import DataError, ModelError
from salun.evaluation.detector import Detection, DetectorInputs, Samples, Subject, Target
from salun.files import sha256_file
from salun.progress import Event, Progress, Stage, silent
from salun.untrusted import read_json

DESCRIPTION, WEIGHTS = "detector.json", "detector.safetensors"
VALIDITY = "picture"  # name of the validity head in weights files  # codespell:ignore picture


class AttributeClassifier(nn.Module):
    """A stride-2 CNN with mean and max pooling, a linear head per attribute and one for whether an image is valid."""

    name, version = "attribute", "1"
    threshold, unit = 0.0, "logit minus the largest other logit of the attribute"
    prompt_match = None

    def __init__(self, labels: dict[str, list[str]], resolution: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.labels, self.resolution, self.channels, self.sha256 = labels, resolution, channels, ""
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels[-1], len(of)) for name, of in labels.items()})
        self.add_module(VALIDITY, nn.Linear(2 * channels[-1], 2))

    def pooled(self, images: Tensor) -> Tensor:
        """images: float (n, 3, h, w) in −1…1 → features (n, 2·channels[-1])."""
        if images.shape[-1] != self.resolution or images.shape[-2] != self.resolution:
            images = F.interpolate(images, (self.resolution, self.resolution), mode="area")
        h = self.body(images)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per attribute and, under `VALIDITY`, of (invalid, valid)."""
        return self._logits(self.pooled(images))

    def _logits(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features) for name, head in self.heads.items()} | {
            VALIDITY: self.get_submodule(VALIDITY)(features)
        }

    def target(self, subject: Subject) -> Target | None:
        """The attribute and the labels of a concept in the model's vocabulary."""
        attribute = subject.attribute or ""
        labels = self.labels.get(attribute, [])
        if subject.name not in labels:
            return None
        anchor = labels.index(subject.anchor) if subject.anchor in labels else None
        return Target(attribute, labels.index(subject.name), anchor)

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """The likeliest label of each attribute, in valid images."""
        seen = self.detect_images(samples.images)
        progress(Event(Stage.DETECTING, len(samples), len(samples)))
        return seen

    @torch.no_grad()
    def detect_images(self, images: np.ndarray, batch_size: int = 256) -> Detection:
        """As `detect`, in uint8 images (n, h, w, 3)."""
        if not len(images):
            none = {name: np.empty((0, len(of)), np.float32) for name, of in self.labels.items()}
            features_of_none = np.empty((0, 2 * self.channels[-1]), np.float32)
            return Detection(none, self.threshold, np.empty(0, bool), features_of_none)
        device = next(self.parameters()).device
        scores: dict[str, list[Tensor]] = {name: [] for name in self.labels}
        valid, features = [], []
        for start in range(0, len(images), batch_size):
            x = torch.from_numpy(images[start : start + batch_size]).to(device)
            pooled = self.pooled(x.permute(0, 3, 1, 2).float() / 127.5 - 1)
            logits = self._logits(pooled)
            valid.append(logits[VALIDITY].argmax(1) != 0)
            for name in self.labels:
                scores[name].append(margins(logits[name]).masked_fill(~valid[-1][:, None], -torch.inf).cpu())
            features.append(pooled.cpu())
        return Detection(
            {name: torch.cat(parts).numpy() for name, parts in scores.items()},
            self.threshold,
            torch.cat(valid).cpu().numpy(),
            torch.cat(features).float().numpy(),
        )

    def save(self, folder: Path) -> None:
        """Write both files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "schema": 1,
            "attributes": self.labels,
            "resolution": self.resolution,
            "channels": list(self.channels),
        }
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)


def margins(logits: Tensor) -> Tensor:
    """Each logit (n, labels) minus the largest other one of its row; infinite where there is no other."""
    first, best = logits.max(1, keepdim=True)
    second = logits.scatter(1, best, -torch.inf).amax(1, keepdim=True)
    return (logits - first).scatter(1, best, first - second)


def load(inputs: DetectorInputs) -> AttributeClassifier | None:
    """The detector in a model's folder, None for a model without one. Raises DataError as `load_classifier`."""
    return load_classifier(inputs.folder, inputs.device) if inputs.folder is not None else None


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> AttributeClassifier:
    """The detector in `folder`, in eval mode. Raises DataError if a file is missing or they do not fit together."""
    try:
        described = _checked(read_json(folder / DESCRIPTION))
        with torch.device("meta"):  # without memory, until the file is known to hold such tensors
            empty = AttributeClassifier(*described)
        expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        file = folder / WEIGHTS
        present = {name: entry.shape for name, entry in safetensors_io.read_header(file).entries.items()}
        if present != expected:
            name = min(set(present.items()) ^ set(expected.items()))[0]
            raise ValueError(f"{safetensors_io.truncated(name)} in {WEIGHTS} does not fit {DESCRIPTION}")
        model = AttributeClassifier(*described)
        model.sha256 = sha256_file(file)
        model.load_state_dict({name: tensor.float() for name, tensor in safetensors_io.tensors(file)})
    except (OSError, KeyError, ValueError, RuntimeError, ModelError) as error:
        raise DataError(f"the detector in {folder} cannot be used: {error}") from error
    return model.eval().to(device)


def _checked(described: Any) -> tuple[dict[str, list[str]], int, tuple[int, ...]]:
    """Labels, resolution and channels of an untrusted `detector.json`. Raises ValueError."""
    values = described if isinstance(described, dict) else {}
    labels, resolution, channels = (values.get(key) for key in ("attributes", "resolution", "channels"))
    if not isinstance(labels, dict) or not all(
        name.isidentifier()
        and name != VALIDITY
        and isinstance(of, list)
        and 1 <= len(of) <= 1000
        and all(isinstance(v, str) for v in of)
        for name, of in labels.items()
    ):
        raise ValueError("attributes must be names, each with a list of 1 to 1000 texts")
    if type(resolution) is not int or not 8 <= resolution <= 1024:
        raise ValueError("resolution must be an integer from 8 to 1024")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 10:
        raise ValueError("channels must be a list of 1 to 10 integers")
    if not all(type(width) is int and 8 <= width <= 4096 and width % 8 == 0 for width in channels):
        raise ValueError("channels must be multiples of 8, from 8 to 4096")
    return labels, resolution, tuple(channels)
