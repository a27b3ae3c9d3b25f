"""Pretrained models that look at images: their revisions, errors and hashes, and images as they take them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.transformers_folder import commit_of, local_folder, weight_files
from salun.errors import DataError, ModelError
from salun.files import sha256_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP, RESNET = "openai/clip-vit-large-patch14", "microsoft/resnet-50"
REVISIONS = {  # so that a name means the same weights on every machine
    CLIP: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    RESNET: "34c2154c194f829b11125337b98c8f5f9965ff19",
}
BATCH = 32
Prepare = Callable[[np.ndarray], "Tensor"]  # an image, uint8 (h, w, 3) → as a model takes it, float32 (3, h, w)
Network = Callable[["Tensor"], "Tensor"]  # prepared images, float32 (n, 3, h, w) → what a model makes of each, (n, …)


def version_of(name: str, folder: Path) -> str:
    """A model's version for results: of a hub id with the commit that was used, of the user's folder its name.

    Results are published, and where a folder lies concerns nobody else; the hash of the weights says what is in it.

    Args:
        name: As the user gave it.
        folder: Where its files are.
    """
    if local_folder(name) is not None:
        return os.path.basename(os.path.abspath(folder))
    commit = commit_of(folder)
    return f"{name.partition('@')[0]}@{commit}" if commit else name


def weights_hash(folder: Path) -> str:
    """The sha256 of the file with a model's weights; of several, of their hashes in the order of their names."""
    hashes = [sha256_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@contextmanager
def loading() -> Iterator[None]:
    """Context manager: a model that cannot be loaded is a DataError, as of any file of a detector."""
    try:
        yield
    except ModelError as error:
        raise DataError(error.message, option=error.option, advice=error.advice) from error


def by_processor(processor: Any) -> Prepare:
    """What transformers' image processor of a model makes of an image."""

    def prepare(image: np.ndarray) -> Tensor:
        pixels = processor(images=image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        first: Tensor = pixels[0]
        return first

    return prepare


def batches(images: Iterable[np.ndarray], prepare: Prepare, device: torch.device | str) -> Iterator[Tensor]:
    """Images as a model takes them, float32 (up to `BATCH`, 3, h, w).

    Args:
        images: uint8 (h, w, 3) each; one of them is held at a time.
    """
    import torch

    batch: list[Tensor] = []
    for image in images:
        batch.append(prepare(image))
        if len(batch) == BATCH:
            yield torch.stack(batch).to(device)
            batch = []
    if batch:
        yield torch.stack(batch).to(device)
