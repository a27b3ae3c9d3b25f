"""Safetensors files: untrusted headers are validated, tensors read lazily, equal content written as equal bytes.

The library's own writer puts metadata in random order; ours writes metadata sorted and tensors in the order given, with
no time or path in the file. Layout: 8 bytes little-endian header length, JSON header padded with spaces to a multiple
of 8, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from salun.checkpoints.signature import DOWNLOAD_AGAIN, PICKLE, SAFETENSORS, UNKNOWN, advice, kind_of
from salun.errors import ModelError
from salun.files import atomic as atomic

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
_MAX_HEADER = 12 * 1024 * 1024  # the largest models' take a fifth; parsed, the worst of this size takes 600 MB
_MAX_SHAPE = 16, 1 << 62  # dimensions, and entries in all: what torch can describe
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start, end: byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class FileStamp:
    """Identifies a file's state, to notice later writes: bytes, modification time in nanoseconds, device and inode."""

    size: int
    changed: int
    inode: int

    @staticmethod
    def of(path: Path) -> FileStamp:
        """Raises ModelError if the file is gone."""
        try:
            seen = path.stat()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
        return FileStamp(seen.st_size, seen.st_mtime_ns, seen.st_ino)


@dataclass(frozen=True)
class Header:
    """entries: name → where it lies, in the file's order of bytes; listed: the names in the header's own order.

    metadata: the file's strings. data_start: bytes. stamp: of the file when this was read.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    listed: list[str]
    stamp: FileStamp

    @property
    def names(self) -> list[str]:
        return list(self.entries)


def read_header(path: Path) -> Header:
    """The checked header of an untrusted file. Raises ModelError naming the file and the fault."""

    def fault(what: str) -> ModelError:
        return ModelError(f"{path} is not a valid safetensors file: {what}", advice=DOWNLOAD_AGAIN)

    stamp = FileStamp.of(path)
    size = stamp.size
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ModelError(f"{path} is not a file", advice="Give a .safetensors file or a diffusers folder")
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                kind = kind_of(path)
                if kind == PICKLE:
                    raise ModelError(
                        f"{path} is a pickle, despite its name", advice="Use the model's .safetensors file"
                    )
                if kind not in (SAFETENSORS, UNKNOWN):
                    raise ModelError(f"{path} is not a valid safetensors file: it is {kind}", advice=advice(kind))
                raise fault(f"it declares a header of {length} bytes in a file of {size}")
            raw = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise fault(f"its header is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise fault("its header is not a JSON object")
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fault("its metadata are not strings")
    try:
        "".join([*raw, *metadata, *metadata.values()]).encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise fault("its names or metadata are not Unicode") from error
    start = 8 + length
    entries: dict[str, Entry] = {}
    for name, item in raw.items():
        entries[name] = _entry(name, item, start, fault)
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end))
    position = start
    for name, entry in ordered:
        if entry.start != position:
            raise fault(f"{truncated(name)} begins at byte {entry.start}, not at {position}")
        position = entry.end
    if position != size:
        raise fault(f"its tensors end at byte {position}, the file at {size} (truncated?)")
    return Header(dict(ordered), metadata, start, list(entries), stamp)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _entry(name: str, item: Any, data_start: int, fault: Any) -> Entry:
    name = truncated(name)
    try:
        dtype, shape, (start, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise fault(f"{name} lacks dtype, shape or offsets") from error
    if not is_shape(shape) or not all(is_shape([offset]) for offset in (start, end)):
        raise fault(f"{name} has an invalid shape or offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fault(f"{name} has the unknown dtype {truncated(str(dtype))!r}")
    needed = prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise fault(f"{name} takes {end - start} bytes, but its shape {shape} needs {needed}")
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def is_shape(value: Any) -> bool:
    """Whether an untrusted value is a list of sizes such as a tensor can have."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_SHAPE[0]
        and all(type(size) is int and size >= 0 for size in value)
        and prod(max(size, 1) for size in value) <= _MAX_SHAPE[1]
    )


def truncated(name: str) -> str:
    """An untrusted name, shortened for a message."""
    return name if len(name) <= 120 else f"{name[:120]}…"


def tensors(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), one at a time, each a copy of its own. Raises ModelError if the file has changed meanwhile."""
    header = read_header(path)
    with path.open("rb") as file:
        for name in header.names if names is None else names:
            tensor = read_tensor(file, header.entries[name], path)
            if FileStamp.of(path) != header.stamp:
                raise modified_during_read(path)
            yield name, tensor


def read_tensor(file: IO[bytes], entry: Entry, path: Path) -> Tensor:
    """One tensor of an open file. Read, not mapped: a file cut short meanwhile is an error, not a crash."""
    content = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise modified_during_read(path)
    dtype = DTYPES[entry.dtype]
    return (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)).view(entry.shape)


def read_one(path: Path, header: Header, name: str) -> Tensor:
    """A tensor of a file whose header is known. Raises ModelError if the file has changed since that was read."""
    try:
        with path.open("rb") as file:
            tensor = read_tensor(file, header.entries[name], path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if FileStamp.of(path) != header.stamp:
        raise modified_during_read(path)
    return tensor


def modified_during_read(path: Path) -> ModelError:
    """What to raise when a file is no longer what it was when it was first read."""
    return ModelError(f"{path} was modified while being read", advice="Wait for the other writer and retry")


def write(path: Path, items: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order given (wider dtypes first, which keeps them aligned), metadata sorted.

    Atomic: a temporary file, synced, then renamed. Raises ModelError if the disk has no room.
    """
    write_lazily(path, {name: (t.dtype, tuple(t.shape)) for name, t in items.items()}, items, metadata)


def write_lazily(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    items: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write`, of tensors that are made on access: one is in memory at a time.

    described: name → dtype and shape of what `items` gives for it.
    """
    described = dict(sorted(described.items(), key=lambda pair: -pair[1][0].itemsize))
    entries, position = {}, 0
    for name, (dtype, shape) in described.items():
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = _header_bytes(entries, dict(sorted((metadata or {}).items())))
    with atomic(path, len(header) + position) as file:
        file.write(header)
        for name, (dtype, shape) in described.items():
            tensor = items[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            for block in _bytes(tensor):
                file.write(block)


def rewrite(
    source: Path,
    target: Path,
    replaced: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dropped: Collection[str] = (),
    stamp: FileStamp | None = None,
) -> None:
    """Copy a file, tensor bytes, names and metadata in their orders, some tensors replaced and metadata added.

    Every tensor neither in `replaced` nor in `dropped` keeps its bytes, and the file its other metadata; an empty text
    takes a key of them away. One chunk is in memory at a time. stamp: of the source when it was first read. Raises
    ModelError if a tensor is not in the file or differs in dtype or shape, if target is the source, if the source has
    changed, or if the disk has no room; nothing is left at `target` then.
    """
    header = read_header(source)
    if target.exists() and os.path.samefile(source, target):
        raise ModelError(f"{target} is the source itself", advice="Write to another name")
    fresh = set(replaced)
    if fresh - set(header.entries):
        raise ModelError(f"{source} has no tensor {min(fresh - set(header.entries))}")
    unwanted = set(dropped)
    top, size = _rewritten_header(header, metadata, unwanted)
    with atomic(target, len(top) + size) as out, source.open("rb") as inside:
        out.write(top)
        for name, entry in header.entries.items():
            if name in fresh and name not in unwanted:
                tensor = replaced[name]
                if (entry.dtype, entry.shape) != (NAMES[tensor.dtype], tuple(tensor.shape)):
                    raise ModelError(
                        f"{name} is {entry.dtype} {list(entry.shape)} in {source}, "
                        f"not {NAMES[tensor.dtype]} {list(tensor.shape)}"
                    )
                for block in _bytes(tensor):
                    out.write(block)
            elif name not in unwanted:
                _copy_bytes(inside, out, entry, source)
        if FileStamp.of(source) != (stamp or header.stamp):
            raise modified_during_read(source)


def _rewritten_header(header: Header, metadata: Mapping[str, str], dropped: set[str]) -> tuple[bytes, int]:
    """The header of a copy, and how many bytes of tensors follow it."""
    offsets, position = {}, 0
    for name, entry in header.entries.items():
        if name not in dropped:
            offsets[name] = [position, position + entry.end - entry.start]
            position += entry.end - entry.start
    described = {
        name: {
            "dtype": header.entries[name].dtype,
            "shape": list(header.entries[name].shape),
            "data_offsets": offsets[name],
        }
        for name in header.listed
        if name in offsets
    }
    merged = {**header.metadata, **dict(sorted(metadata.items()))}
    retained = {key: text for key, text in merged.items() if text or key not in metadata}
    return _header_bytes(described, retained), position


def _copy_bytes(source: IO[bytes], target: IO[bytes], entry: Entry, path: Path) -> None:
    source.seek(entry.start)
    left = entry.end - entry.start
    while left:
        block = source.read(min(left, _CHUNK))
        if not block:
            raise modified_during_read(path)
        target.write(block)
        left -= len(block)


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes as a flat uint8 tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    for chunk in raw_bytes(tensor).split(_CHUNK):
        yield chunk.numpy().data


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps({**described, **entries}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
