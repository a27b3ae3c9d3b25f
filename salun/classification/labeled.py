"""Labeled images as tensors in memory, and how they are assembled from files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.classification.pixel_store import pixels_of
from salun.compute.device import to_device
from salun.errors import ConfigError, DataError, some
from salun.images import Source
from salun.runs.cache import Cache
from salun.user_text import composed

ROLES = ("train", "validation", "test")
_SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
COUNTED = 5000  # training images, evenly spaced, that mean and std are counted of
NAME_PARTS = "Name the parts by {split}, such as train=NAME,test=NAME"
_FILLERS = {"set", "data", "dataset", "split", "images", "imgs", "folder", "seg"}  # as in train_set, seg_train


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labeled images. A row is an image's index, the same in every part of the program.

    images: uint8 (n, c, h, w). labels: int64 (n,). classes: names by label. own_test, own_validation: rows of the data
    set's own test and validation part, None where it has none. preset: mean, std, augment, model and train, from
    `datasets.yaml`. notes: what a user should know about how the data was read. names: of each row's image in messages,
    () where images have none. device: where batches are made, which holds the images too if it has the memory.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    own_test: Tensor | None = None
    own_validation: Tensor | None = None
    preset: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")

    @property
    def channels(self) -> int:
        """1 for gray images, 3 for color."""
        return int(self.images.shape[1])

    @property
    def size(self) -> int:
        """Pixels of the longer side."""
        return int(max(self.images.shape[2:]))

    @cached_property
    def digest(self) -> str:
        """A hash of pixels, labels and class names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def image_name(self, row: int) -> str:
        """A row's image in messages: its file without the folder, or the row's number."""
        return Path(self.names[row]).name if self.names else f"row {row}"

    def to(self, device: torch.device, room: int | None = None) -> ImageData:
        """The same data for a device. Rows may be given on any device.

        Args:
            room: Bytes that images may take there, by default half of a GPU's free memory: more stay where they are,
                and each batch is sent, which the device works through while the next is read.
        """
        if room is None and device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0] // 2
        stay = room is not None and self.images.nbytes > room
        images = self.images if stay else self.images.to(device)
        return replace(self, images=images, labels=self.labels.to(device), device=device)

    def pixels_of(self, rows: Tensor) -> Tensor:
        """The images of these rows, uint8 (b, c, h, w), on the device."""
        return to_device(self.images[rows.to(self.images.device)], self.device)

    def images_of(self, rows: Tensor) -> Tensor:
        """Likewise, normalized: float32."""
        return self.normalize(self.pixels_of(rows))

    def normalize(self, images: Tensor) -> Tensor:
        """(pixels/255 − mean) / std of uint8 images."""
        mean, std = (torch.tensor(self.preset[key], device=images.device).view(-1, 1, 1) for key in ("mean", "std"))
        return (images.float() / 255 - mean) / std

    def statistics(self, rows: Tensor) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the pixels, from 0 to 1, of each channel; of many rows, of COUNTED of them."""
        counts = torch.zeros(self.channels, 256, dtype=torch.int64)
        for part in rows[:: max(len(rows) // COUNTED, 1)].split(256):
            images = self.images[part.to(self.images.device)].cpu()
            for channel in range(self.channels):
                counts[channel] += torch.bincount(images[:, channel].flatten(), minlength=256)
        levels, weights = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum(1, keepdim=True)
        mean = (weights * levels).sum(1)
        std = (weights * (levels - mean[:, None]).square()).sum(1).sqrt().clamp(min=1 / 255)
        return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """As `images_of`, each shifted by up to an eighth of its size, padded black; with crop-flip half mirrored."""
        kind = self.preset["augment"]
        if kind == "none":
            return self.images_of(rows)
        images = self.pixels_of(rows)
        (b, _, h, w), pad = images.shape, self.size // 8
        shift = torch.randint(0, 2 * pad + 1, (b, 2), generator=generator).to(images.device)
        flip = (torch.rand(b, generator=generator) < (0.5 if kind == "crop-flip" else 0.0)).to(images.device)
        down = torch.arange(h, device=images.device) + shift[:, :1]
        across = torch.arange(w, device=images.device) + shift[:, 1:]
        across = torch.where(flip[:, None], across.flip(1), across)
        padded = F.pad(images, (pad, pad, pad, pad))
        each = torch.arange(b, device=images.device)[:, None, None]
        return self.normalize(padded[each, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2))


@dataclass(frozen=True)
class Sample:
    """An image to be read: where from, its name in messages, and its label."""

    source: Source
    name: str
    label: int


def assembled(
    name: str,
    parts: Mapping[str, Sequence[Sample]],
    classes: Sequence[str],
    image_size: int | None,
    notes: Sequence[str],
    preset: dict[str, Any],
) -> ImageData:
    """A data set of these images, part after part; gray if all are. Decoded images are kept in the user's cache.

    Args:
        name: of the data set, in messages.
        parts: role → images; "train" alone, or with the others of ROLES.
        classes: names by label.
        image_size: pixels a side to which images are resized.
        notes: of how the parts were found; those of single images are added.
        preset: as in `ImageData`.

    Raises:
        DataError: an image cannot be read, or their sizes differ where none is given.
    """
    samples = [sample for role in ROLES for sample in parts.get(role, ())]
    sources = [(sample.source, sample.name) for sample in samples]
    images, traits = pixels_of(sources, name, image_size, Cache.of_user())
    rows, start = {}, 0
    for role in ROLES:
        rows[role] = torch.arange(start, start + len(parts.get(role, ())))
        start += len(rows[role])
    others = {role: rows[role] if len(rows[role]) else None for role in ROLES[1:]}
    labels = torch.tensor([sample.label for sample in samples])
    lines = (*notes, *(f"{name}: {line}" for line in (*alike(classes), *traits)))
    names = tuple(sample.name for sample in samples)
    return ImageData(
        name,
        images,
        labels,
        tuple(classes),
        others["test"],
        others["validation"],
        preset=preset,
        notes=lines,
        names=names,
    )


def alike(classes: Sequence[str]) -> list[str]:
    """A line on class names that differ only by case, spaces or the form of Unicode: most likely a mistake."""
    same: dict[str, list[str]] = {}
    for name in classes:
        same.setdefault(" ".join(composed(name).casefold().split()), []).append(name)
    what = "class names that differ only by case, spaces or Unicode form are separate classes"
    return [f"{what}: {', '.join(map(repr, names))}" for names in same.values() if len(names) > 1]


def role_of(name: str) -> str | None:
    """The role of a part named `train`, `Test` or `training_set`: one of ROLES; None for any other name."""
    terms = [term for term in re.split(r"[\W_]+", name.casefold()) if term and term not in _FILLERS]
    return _SPLIT_NAMES.get(terms[0]) if len(terms) == 1 else None


def given_parts(text: str | None) -> dict[str, str]:
    """role → name of the part with that role, by the option `split`; empty where that is not given.

    Raises ConfigError for other texts than train=NAME, with test=NAME or validation=NAME after commas.
    """
    pairs = [[side.strip() for side in item.partition("=")[::2]] for item in (text or "").split(",")]
    parts = {role: name for role, name in pairs if name}
    if text is not None and (len({*parts.values()}) < len(pairs) or not {"train"} <= {*parts} <= {*ROLES}):
        raise ConfigError(
            f"is {text!r}, but must be train=NAME, with test=NAME or validation=NAME after commas", option="split"
        )
    return parts


def role_in(name: str, given: Mapping[str, str]) -> str | None:
    """The role of a part: as of `role_of`, or by `given_parts` if there are any."""
    return next((role for role, part in given.items() if part == name), None) if given else role_of(name)


def roles_of(names: Sequence[str], where: str, given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """role → name of the part with that role, and notes that report this.

    A validation part without a test part is the test part, as such data sets are published, unless parts are given.
    Raises DataError without a training part, with two parts for one role, or for a given part that does not exist.
    """
    missing = [part for part in given.values() if part not in names]
    if missing:
        raise DataError(f"names {missing[0]}, but {where} has only the parts {some(names, 10)}", option="split")
    roles: dict[str, str] = {}
    notes = []
    for name in names:
        role = role_in(name, given)
        if role is None:
            notes.append(f"{where}: the part {name} is not used")
        elif role in roles:
            raise DataError(
                f"{where} has two {role} parts, {roles[role]} and {name}",
                advice="Keep one of them, or choose by {split}",
            )
        else:
            roles[role] = name
    if "train" not in roles:
        raise DataError(f"{where} has no part named train, only {', '.join(names)}", advice=NAME_PARTS)
    if "validation" in roles and "test" not in roles and not given:
        roles["test"] = roles.pop("validation")
    validation = roles.get("validation", f"drawn from {roles['train']} (validation_share)")
    test = roles.get("test", f"drawn from {roles['train']} (test_share)")
    return roles, [f"{where}: training part {roles['train']}, validation {validation}, test {test}", *notes]


def by_number(name: str) -> tuple[bool, int, str, str]:
    """Sorts names that are numbers as numbers, and all others after them."""
    digits = name.lstrip("0") if name.isascii() and name.isdigit() else ""
    is_number = bool(digits) or (name != "" and set(name) == {"0"})
    return not is_number, len(digits), digits, name
