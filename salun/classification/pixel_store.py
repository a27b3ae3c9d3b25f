"""A data set's images as one uint8 tensor: decoded once, then mapped from a file of the cache that processes share.

An entry is found by the files' paths, sizes, times of change and inodes, or by the content where images are not files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.errors import DataError, ModelError
from salun.images import Source, counted, read_images
from salun.runs.cache import Cache, key_of

FORMAT = "salun-pixels-1"
WORTHWHILE = 1.0  # seconds of decoding from which images are stored
IN_MEMORY = 2**28  # bytes up to which images are decoded in memory
SETTLED = 2.0  # seconds since a file's last change: within less, a clock's steps may hide another one

Named = tuple[Source, str]
logger = logging.getLogger("salun")


def pixels_of(sources: Sequence[Named], where: str, size: int | None, cache: Cache) -> tuple[Tensor, list[str]]:
    """All images, uint8 (n, c, h, w), color if any is, and lines of what a user should know of some of them.

    Args:
        sources: Each with its name in messages.
        where: The data set, in messages.
        size: Pixels a side to which they are resized; None where they have one size.
        cache: Where decoded images are stored; large sets are decoded there, not in memory.

    Raises:
        DataError: As `read_images`, or they fit neither into memory nor into the cache.
    """
    began, key = time.time(), _key_of(sources, size)
    stored = cache.load(key, _read)
    if stored is not None:
        return stored
    clock = time.perf_counter()
    images, traits = _decoded(sources, where, size, cache)
    if time.perf_counter() - clock < WORTHWHILE or _last_change(sources) > began - SETTLED:
        return images, traits
    if _key_of(sources, size) != key:  # a file was replaced meanwhile
        return images, traits
    metadata = {"format": FORMAT, "lines": json.dumps(traits), "digest": _digest(images)}
    cache.save(key, images.numel(), lambda path: safetensors_io.write(path, {"images": images}, metadata))
    return cache.load(key, _read) or (images, traits)


def _key_of(sources: Sequence[Named], size: int | None) -> str:
    """The hash of all that the pixels depend on: files or contents in their order, size, decoders."""
    digest = hashlib.sha256()
    for source, name in sources:
        if isinstance(source, bytes):
            what = hashlib.sha256(source).hexdigest()
        else:
            what = repr((str(source.absolute()), _state_of(source)))
        digest.update(f"{name}\0{what}\0".encode("utf-8", "surrogateescape"))
    return key_of(kind=FORMAT, images=digest.hexdigest(), count=len(sources), size=size, decoders=_decoders())


def _state_of(path: Path) -> tuple[int, int, int, int]:
    """What changes when a file does; zeros for one that is gone, which reading reports."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0, 0, 0
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _last_change(sources: Sequence[Named]) -> float:
    """When the last file changed, in seconds since the epoch; 0 without files."""
    states = (_state_of(source) for source, _ in sources if isinstance(source, Path))
    return max((max(state[1:3]) for state in states), default=0) / 1e9


def _decoders() -> list[str]:
    versions = []
    for package in ("pillow", "pillow-heif", "pillow-avif-plugin"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return versions


def _decoded(sources: Sequence[Named], where: str, size: int | None, cache: Cache) -> tuple[Tensor, list[str]]:
    """As `pixels_of`, read from the sources. Held once, except while gray images are copied at the first color one."""
    traits: dict[str, list[str]] = {}
    images = np.empty((0, 0, 1, 1), np.uint8)
    for i, (pixels, more) in enumerate(read_images(sources, where, size)):
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if len(planes) > images.shape[1]:  # the first image, or the first color after gray ones
            before, images = images, _room((len(sources), *planes.shape), where, cache)
            if i:
                images[:i] = before[:i]
        images[i] = planes
        for trait in more:
            traits.setdefault(trait, []).append(sources[i][1])
    return torch.from_numpy(images), counted(traits)


def _room(shape: tuple[int, ...], where: str, cache: Cache) -> np.ndarray:
    """An array for all images: in memory, or for large sets that the cache may hold in a file without a name there.

    Raises DataError if they fit into neither, hours before the system would end the process.
    """
    (count, _, h, w), size = shape, prod(shape)
    if IN_MEMORY < size <= cache.limit:
        try:
            return _mapped(shape, cache.folder)
        except OSError as error:
            logger.info("%s: images are decoded in memory, as %s holds no such file: %s", where, cache.folder, error)
    free = _free_memory()
    if size > free:
        limit = f"; larger sets than {cache.limit / 1e9:.3g} GB (SALUN_CACHE_SIZE) are not decoded on disk"
        raise DataError(
            f"{where} has {count:,} images of {w}×{h} pixels, which take {size / 1e9:.3g} GB in memory; "
            f"{free / 1e9:.3g} GB are free{limit if size > cache.limit else ''}",
            advice="Choose a smaller {image_size}, or fewer images",
        )
    return np.empty(shape, np.uint8)


def _mapped(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """An array in a new file of a folder, which vanishes with it. Raises OSError if the disk has no room."""
    folder.mkdir(parents=True, exist_ok=True)
    size = prod(shape)
    if _free_disk(folder) < 2 * size:  # the entry is a copy
        raise OSError(f"{2 * size / 1e9:.3g} GB are needed, {_free_disk(folder) / 1e9:.3g} GB are free")
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up meanwhile would end the process
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _read(path: Path) -> tuple[Tensor, list[str]]:
    """An entry, mapped: its pages are read when needed and shared with other processes. Raises ModelError if invalid.

    Checked by its digest first. The mapping is private: writing to the tensor would not change the file.
    """
    header = safetensors_io.read_header(path)
    entry = header.entries.get("images")
    if header.metadata.get("format") != FORMAT or entry is None or entry.dtype != "U8" or len(entry.shape) != 4:
        raise ModelError("it holds no images")
    images = torch.from_numpy(np.memmap(path, np.uint8, "c", entry.start, entry.shape))
    if header.metadata.get("digest") != _digest(images):
        raise ModelError("its content does not match its digest")
    try:
        lines = [str(line) for line in json.loads(header.metadata["lines"])]
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError("its notes cannot be read") from error
    return images, lines


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().data).hexdigest()
