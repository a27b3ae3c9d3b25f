"""A content-addressed cache on disk for tensors that are expensive to compute and deterministic.

One safetensors file an entry, in the user's cache folder (SALUN_CACHE names another), written atomically. A truncated
or altered entry is ignored. When all of them exceed the limit (SALUN_CACHE_SIZE, such as "500MB", "20GB" or 0 for no
cache), the least recently used are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.errors import ConfigError, ModelError, SalunError
from salun.files import is_temporary, remove_abandoned

FORMAT = "salun-cache-1"
DEFAULT_LIMIT = 5 * 10**9
_LARGEST = 2**63 - 1  # bytes
logger = logging.getLogger("salun")
T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """folder: of the entries. limit: bytes of all entries together; 0 stores nothing."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @staticmethod
    def of_user() -> Cache:
        """The cache that all runs of the user share. Raises ConfigError for a SALUN_CACHE_SIZE that cannot be read."""
        folder = os.environ.get("SALUN_CACHE")
        if not folder:
            import platformdirs  # a WebUI has none, and names its own folder

            folder = platformdirs.user_cache_dir("salun", appauthor=False)
        return Cache(Path(folder).expanduser(), size_of(os.environ.get("SALUN_CACHE_SIZE", str(DEFAULT_LIMIT))))

    @property
    def converted(self) -> Path:
        """Folder of pickles converted to safetensors; as large as these, and kept until `clear`."""
        return self.folder / "converted"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors, or None if there is no valid one."""

        def read(path: Path) -> dict[str, Tensor]:
            metadata = safetensors_io.read_header(path).metadata
            tensors = dict(safetensors_io.tensors(path))
            if metadata.get("format") != FORMAT or metadata.get("digest") != _digest(tensors):
                raise ModelError("its content does not match its digest")
            return tensors

        return self.load(key, read)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry. A full or read-only disk does not stop the run."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())

        def write(path: Path) -> None:
            held = {name: t.detach().cpu() for name, t in tensors.items()}
            safetensors_io.write(path, held, {"format": FORMAT, "digest": _digest(held)})

        self.save(key, size, write)

    def load(self, key: str, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of an entry in a file format of its own, such as a mask.

        None if there is none; one for which `read` raises a SalunError is invalid, and removed.
        """
        path = self._path(key)
        if not self.limit or not path.is_file():
            return None
        try:
            value = read(path)
        except (SalunError, OSError) as error:
            logger.warning("the cache entry %s is invalid and will be computed again: %s", path.name, error)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # a cache that may only be read, or an entry that has just gone
            os.utime(path)  # most recently used
        return value

    def save(self, key: str, size: int, write: Callable[[Path], None]) -> None:
        """Store an entry of about `size` bytes that `write` writes atomically. Errors as in `put`."""
        if size > self.limit:
            if self.limit:
                logger.warning(
                    "%.1f MB are not cached: the limit of %s is %.1f MB (SALUN_CACHE_SIZE)",
                    size / 1e6, self.folder, self.limit / 1e6,
                )  # fmt: skip
            return
        try:
            write(self._path(key))
            self._make_room()
        except (ModelError, OSError) as error:
            logger.warning("the entry could not be stored in the cache %s: %s", self.folder, error)

    def file_of(self, key: str) -> Path | None:
        """Where an entry is that its user reads and writes itself, such as a training's state; None without a cache."""
        return self._path(key) if self.limit else None

    def entries(self) -> list[tuple[Path, int, float]]:
        """(file, bytes, when last used) of every entry, least recently used first."""
        entries = []
        for path in self.folder.glob("??/*.safetensors") if self.folder.is_dir() else ():
            try:
                facts = path.stat()
            except OSError:  # another process has just removed it
                continue
            entries.append((path, facts.st_size, facts.st_mtime))
        return sorted(entries, key=lambda entry: (entry[2], entry[0]))

    def converted_files(self) -> list[tuple[Path, int]]:
        """(file, bytes) of every converted pickle."""
        return [(path, path.stat().st_size) for path in sorted(self.converted.glob("*/*.safetensors"))]

    def clear(self) -> int:
        """Remove every entry and every converted pickle; returns their number."""
        entries, pickles = self.entries(), self.converted_files()
        for path, *_ in entries:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.converted, ignore_errors=True)
        self._remove_leftovers()
        return len(entries) + len(pickles)

    def _make_room(self) -> None:
        self._remove_leftovers()
        entries = self.entries()
        used = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if used <= self.limit:
                return
            path.unlink(missing_ok=True)
            used -= size

    def _remove_leftovers(self) -> None:
        """Remove temporary files of processes that were killed while writing."""
        for leftover in self.folder.glob("??/.*.tmp") if self.folder.is_dir() else ():
            if is_temporary(leftover):
                remove_abandoned(leftover)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def key_of(**facts: Any) -> str:
    """The key of a result that depends on these facts (JSON values): their sha256, in hex."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of(*tensors: Tensor) -> str:
    """A hash of tensors' dtypes, shapes and bytes."""
    return _digest({str(i): tensor for i, tensor in enumerate(tensors)})


def size_of(text: str) -> int:
    """Bytes in a text such as "500MB", "2.5 GB" or "0". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"SALUN_CACHE_SIZE is {text[:80]!r}: give bytes, or a number with MB or GB, such as 5GB")
    power = ("B", "KB", "MB", "GB", "TB").index((match[2] or "B").upper())
    size = float(match[1]) * 1000**power
    if size > _LARGEST:
        raise ConfigError(f"SALUN_CACHE_SIZE is {text[:80]!r}, more than any disk holds: give a size such as 5GB")
    return int(size)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(safetensors_io.raw_bytes(tensor).numpy().data)
    return digest.hexdigest()
