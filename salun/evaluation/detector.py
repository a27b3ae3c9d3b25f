"""A classifier that reads attributes off pictures: the judge of what an erased model still shows.

A detector is a folder with `detector.json` (attributes, their values, resolution, channels) and
`detector.safetensors`. A model names its own in `salun.yaml`. Beside the attributes a detector says whether a picture
is one at all, so that destruction is not taken for forgetting.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.errors import DataError, ModelError
from salun.untrusted import read_json


@dataclass(frozen=True)
class Reading:
    """What a detector saw in n pictures.

    labels: attribute → int64 array (n,), an index into the attribute's values, −1 where the picture is none.
    features: float32 (n, d), the pooled activations, for Fréchet distances.
    """

    labels: dict[str, np.ndarray]
    features: np.ndarray


class AttributeClassifier(nn.Module):
    """A small stride-2 CNN with mean and max pooling, one linear head per attribute and one for "is a picture"."""

    def __init__(self, attributes: dict[str, list[str]], resolution: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.attributes, self.resolution, self.channels = attributes, resolution, channels
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels[-1], len(v)) for name, v in attributes.items()})
        self.picture = nn.Linear(2 * channels[-1], 2)

    def pooled(self, images: Tensor) -> Tensor:
        """images: float (n, 3, h, w) in −1…1 → features (n, 2·channels[-1])."""
        if images.shape[-1] != self.resolution or images.shape[-2] != self.resolution:
            images = F.interpolate(images, (self.resolution, self.resolution), mode="area")
        h = self.body(images)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per attribute and, under "picture", of (none, a picture)."""
        features = self.pooled(images)
        return {name: head(features) for name, head in self.heads.items()} | {"picture": self.picture(features)}

    @torch.no_grad()
    def read(self, images: np.ndarray, batch_size: int = 256) -> Reading:
        """Read uint8 pictures (n, h, w, 3)."""
        device = self.picture.weight.device
        labels: dict[str, list[Tensor]] = {name: [] for name in self.attributes}
        features = []
        for start in range(0, len(images), batch_size):
            x = torch.from_numpy(images[start : start + batch_size]).to(device)
            pooled = self.pooled(x.permute(0, 3, 1, 2).float() / 127.5 - 1)
            none = self.picture(pooled).argmax(1) == 0
            for name, head in self.heads.items():
                labels[name].append(head(pooled).argmax(1).masked_fill(none, -1).cpu())
            features.append(pooled.cpu())
        return Reading(
            {name: torch.cat(parts).numpy() for name, parts in labels.items()}, torch.cat(features).float().numpy()
        )

    def save(self, folder: Path) -> None:
        """Write `detector.json` and `detector.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "schema": 1,
            "attributes": self.attributes,
            "resolution": self.resolution,
            "channels": list(self.channels),
        }
        (folder / "detector.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "detector.safetensors")


def load_detector(folder: Path, device: torch.device | str = "cpu") -> AttributeClassifier:
    """The detector in `folder`, in eval mode. Raises DataError if a file is missing or they do not fit together."""
    try:
        described = read_json(folder / "detector.json")
        attributes, resolution, channels = _checked(described)
        with torch.device("meta"):  # without memory, until the file is known to hold such tensors
            empty = AttributeClassifier(attributes, resolution, channels)
        wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        file = folder / "detector.safetensors"
        there = {name: entry.shape for name, entry in safetensors_io.read_header(file).entries.items()}
        if there != wanted:
            name = min(set(there.items()) ^ set(wanted.items()))[0]
            raise ValueError(
                f"{safetensors_io.truncated(name)} in detector.safetensors is not what detector.json describes"
            )
        model = AttributeClassifier(attributes, resolution, channels)
        model.load_state_dict({name: tensor.float() for name, tensor in safetensors_io.tensors(file)})
    except (OSError, KeyError, ValueError, RuntimeError, ModelError) as error:
        raise DataError(f"the detector in {folder} cannot be used: {error}") from error
    return model.eval().to(device)


def _checked(described: Any) -> tuple[dict[str, list[str]], int, tuple[int, ...]]:
    """Attributes, resolution and channels of an untrusted `detector.json`. Raises ValueError."""
    found = described if isinstance(described, dict) else {}
    attributes, resolution, channels = (found.get(key) for key in ("attributes", "resolution", "channels"))
    if not isinstance(attributes, dict) or not all(
        name.isidentifier() and isinstance(values, list) and 1 <= len(values) <= 1000 and all(map(_is_text, values))
        for name, values in attributes.items()
    ):
        raise ValueError("attributes must be names, each with a list of texts")
    if type(resolution) is not int or not 8 <= resolution <= 1024:
        raise ValueError("resolution must be a whole number from 8 to 1024")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 10:
        raise ValueError("channels must be a list of 1 to 10 whole numbers")
    if not all(type(width) is int and 8 <= width <= 4096 and width % 8 == 0 for width in channels):
        raise ValueError("channels must be multiples of 8, from 8 to 4096")
    return attributes, resolution, tuple(channels)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
