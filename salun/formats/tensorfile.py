"""Safetensors files: headers of strangers' files checked, tensors read lazily, equal content written as equal bytes.

The library's own writer puts metadata in random order; ours writes metadata sorted and tensors in the order given, with
no time or path in the file. Layout: 8 bytes little-endian header length, JSON header padded with spaces to a multiple
of 8, then the tensors' bytes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from salun.errors import ModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 1024 * 1024  # the library's own limit
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start, end: byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """entries: name → where it lies, in the file's order of bytes. metadata: the file's strings. data_start: bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int

    @property
    def names(self) -> list[str]:
        return list(self.entries)


def read_header(path: Path) -> Header:
    """The checked header of an untrusted file. Raises ModelError naming the file and the fault."""

    def fault(what: str) -> ModelError:
        return ModelError(f"{path} is no sound safetensors file: {what}; fetch or write it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise fault(f"a header of {length} bytes in a file of {size}")
            raw = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise fault(f"its header is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise fault("its header is no JSON object")
    metadata = raw.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fault("its metadata are not strings")
    start = 8 + length
    entries: dict[str, Entry] = {}
    for name, item in raw.items():
        entries[name] = _entry(name, item, start, fault)
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end))
    position = start
    for name, entry in ordered:
        if entry.start != position:
            raise fault(f"{name} begins at byte {entry.start}, not at {position}")
        position = entry.end
    if position != size:
        raise fault(f"its tensors end at byte {position}, the file at {size} (truncated?)")
    return Header(dict(ordered), metadata, start)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(name: str, item: Any, data_start: int, fault: Any) -> Entry:
    try:
        dtype, shape, (start, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise fault(f"{name} lacks dtype, shape or offsets") from error
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if any(type(v) is not int or v < 0 for v in numbers):
        raise fault(f"{name} has a shape or offsets that are no whole numbers")
    if dtype not in DTYPES:
        raise fault(f"{name} is of the unknown dtype {dtype!r}")
    if end - start != prod(shape) * DTYPES[dtype].itemsize:
        raise fault(
            f"{name} takes {end - start} bytes, but its shape {shape} needs {prod(shape) * DTYPES[dtype].itemsize}"
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def tensors(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), one at a time, each a copy of its own; the file is closed at the end."""
    from safetensors import safe_open

    wanted = list(names) if names is not None else read_header(path).names
    with safe_open(str(path), "pt") as file:
        for name in wanted:
            yield name, file.get_tensor(name).clone()  # of the file's map, which must not outlive it


def write(path: Path, items: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order given (wider dtypes first, which keeps them aligned), metadata sorted.

    Atomic: a temporary file, synced, then renamed. Raises ModelError if the disk has no room.
    """
    items = dict(sorted(items.items(), key=lambda pair: -pair[1].element_size()))
    entries, position = {}, 0
    for name, tensor in items.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    header = _header_bytes(entries, metadata or {})
    with atomic(path, len(header) + position) as file:
        file.write(header)
        for tensor in items.values():
            for block in _bytes(tensor):
                file.write(block)


def rewrite(source: Path, target: Path, replaced: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Copy a file, tensor bytes in their order, with some tensors replaced and metadata added.

    Every tensor not in `replaced` keeps its bytes, and the file its other metadata. One chunk is in memory at a time.
    Raises ModelError if a tensor is not in the file or differs in dtype or shape, if target is the source, or if the
    disk has no room; nothing is left at `target` then.
    """
    header = read_header(source)
    if target.exists() and os.path.samefile(source, target):
        raise ModelError(f"{target} is the source itself: write to another name")
    for name, tensor in replaced.items():
        entry = header.entries.get(name)
        if entry is None:
            raise ModelError(f"{source} holds no {name}")
        if (entry.dtype, entry.shape) != (NAMES[tensor.dtype], tuple(tensor.shape)):
            raise ModelError(
                f"{name} is {entry.dtype} {list(entry.shape)} in {source}, "
                f"not {NAMES[tensor.dtype]} {list(tensor.shape)}"
            )
    entries = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start - header.data_start, entry.end - header.data_start],
        }
        for name, entry in header.entries.items()
    }
    top = _header_bytes(entries, {**header.metadata, **metadata})
    total = len(top) + source.stat().st_size - header.data_start
    with atomic(target, total) as out, source.open("rb") as inside:
        out.write(top)
        for name, entry in header.entries.items():
            if name in replaced:
                for block in _bytes(replaced[name]):
                    out.write(block)
                continue
            inside.seek(entry.start)
            left = entry.end - entry.start
            while left:
                copied = inside.read(min(left, _CHUNK))
                if not copied:
                    raise ModelError(f"{source} grew shorter while it was read")
                out.write(copied)
                left -= len(copied)


@contextmanager
def atomic(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A file that appears at `path` only when complete: temporary name beside it, synced, renamed; removed on failure.

    size: bytes it will take, checked against the free disk first. Raises ModelError telling both, or why the file
    cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ModelError(
                f"{path} needs {size:,} bytes, but its disk has {free:,} free: make room or write elsewhere"
            )
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path), str(path.parent)):
            raise  # of what is done inside, such as reading another file
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while writing `path` have left beside it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp").isdigit():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of any kind, atomically."""
    with atomic(path, len(content)) as file:
        file.write(content)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    found = hashlib.sha256()
    while block := file.read(_CHUNK):
        found.update(block)
    return found.hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes as a flat uint8 tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    for chunk in raw_bytes(tensor).split(_CHUNK):
        yield chunk.numpy().data


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**described, **entries}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
