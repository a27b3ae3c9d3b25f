"""The sparse delta: what an erasure changed, small, exact to the bit in both directions, and dialled by a strength.

Per changed tensor it holds which entries changed (packed bits, or their indices where those are smaller) and the XOR of
the old and new bit patterns in the checkpoint's dtype, split into byte planes. XOR makes `apply` at strength 1 and
`undo` exact; with the base at hand new − old gives any other strength.

Who has the delta can undo the erasure: publish the checkpoint, not the delta, where a concept must not come back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salun.errors import ConfigError, ModelError
from salun.formats import tensorfile
from salun.formats.hashing import base_hash, base_hash_fp16

FORMAT = "salun-delta-1"
STRENGTHS = (-0.5, 1.5)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Change:
    """What changed in one tensor. index: int64 (k,), flat, rising. xor: uint8 (k, bytes an entry), little-endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    index: Tensor
    xor: Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """The difference between two states of a model's UNet.

    changes: name → what changed. base_hash, result_hash: of the whole UNet before and after (see `base_hash`).
    metadata: strings saved beside.
    """

    changes: dict[str, Change]
    base_hash: str
    base_hash_fp16: str
    result_hash: str
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def between(
        cls, base: Mapping[str, Tensor], new: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Delta:
        """The delta from `base` to `new`, all tensors of the UNet each. Raises ModelError if they do not pair up."""
        lone = sorted(set(base) ^ set(new))
        if lone:
            raise ModelError(f"the two models do not hold the same tensors: {', '.join(lone[:3])} only on one side")
        changes = {}
        for name in base:
            old, now = base[name], new[name]
            if (old.dtype, old.shape) != (now.dtype, now.shape):
                raise ModelError(
                    f"{name} is {old.dtype} {list(old.shape)} here and {now.dtype} {list(now.shape)} there"
                )
            xor = _entry_bytes(old) ^ _entry_bytes(now)
            index = xor.any(dim=1).nonzero().view(-1)
            if len(index):
                changes[name] = Change(old.dtype, tuple(old.shape), index, xor[index])
        return cls(changes, base_hash(base), base_hash_fp16(base), base_hash(new), dict(metadata or {}))

    @property
    def names(self) -> list[str]:
        return list(self.changes)

    @property
    def changed(self) -> int:
        """Entries that changed, in all."""
        return sum(len(change.index) for change in self.changes.values())

    # -- use ------------------------------------------------------------------------------------------------------

    def apply(self, tensors: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
        """The changed tensors, as new ones. tensors: all of the base UNet, which is not touched.

        Strength 1 is exact to the bit; others give round(old + s·(new − old)), in float32, rounded once. Raises
        ConfigError for a strength outside −0.5…1.5, ModelError for another base, telling both hashes.
        """
        if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
            raise ConfigError(f"strength is {strength}, but must be from {STRENGTHS[0]} to {STRENGTHS[1]}")
        self._require(tensors, self.base_hash, "base")
        return {name: _changed(tensors[name], change, strength) for name, change in self.changes.items()}

    def undo(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's tensors, exact to the bit, from the erased UNet. Raises ModelError if that is another."""
        self._require(tensors, self.result_hash, "erased model")
        return {name: _changed(tensors[name], change, 1.0) for name, change in self.changes.items()}

    def _require(self, tensors: Mapping[str, Tensor], wanted: str, what: str) -> None:
        found = base_hash(tensors)
        if found == wanted:
            return
        same = base_hash_fp16(tensors) == self.base_hash_fp16 and what == "base"
        hint = "the same model in another dtype: convert it first" if same else f"start from the {what} it was made for"
        raise ModelError(f"this delta is for another {what} (hash {wanted[:12]}…, given {found[:12]}…): {hint}")

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write `*.salun.safetensors`; equal deltas give equal bytes."""
        items: dict[str, Tensor] = {}
        described = {}
        for name, change in self.changes.items():
            n, k = prod(change.shape), len(change.index)
            dense = (n + 7) // 8 <= 4 * k or n > 1 << 32
            if dense:
                chosen = np.zeros(n, np.bool_)
                chosen[change.index.numpy()] = True
                items[f"{name}.where"] = torch.from_numpy(np.packbits(chosen, bitorder="little"))
            else:
                items[f"{name}.where"] = torch.from_numpy(change.index.numpy().astype("<u4").view(np.uint8))
            items[f"{name}.xor"] = change.xor.T.contiguous().view(-1)
            described[name] = [tensorfile.NAMES[change.dtype], list(change.shape), "bits" if dense else "index"]
        own = {
            "format": FORMAT,
            "base_hash": self.base_hash,
            "base_hash_fp16": self.base_hash_fp16,
            "result_hash": self.result_hash,
            "tensors": json.dumps(described, separators=(",", ":")),
        }
        tensorfile.write(Path(path), items, {**self.metadata, **own})

    @classmethod
    def load(cls, path: Path | str) -> Delta:
        """Read a delta file, untrusted. Raises ModelError if it is none or does not hold together."""
        header = tensorfile.read_header(Path(path))
        metadata = dict(header.metadata)
        if metadata.pop("format", None) != FORMAT:
            raise ModelError(f"{path} is not a salun delta (its header names no format {FORMAT})")
        stored = dict(tensorfile.tensors(Path(path), header.names))
        try:
            described = json.loads(metadata.pop("tensors"))
            hashes = [metadata.pop(key) for key in ("base_hash", "base_hash_fp16", "result_hash")]
            changes = {
                name: _read_change(stored[f"{name}.where"], stored[f"{name}.xor"], *entry)
                for name, entry in described.items()
            }
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(f"the delta {path} is damaged: {error}") from error
        return cls(changes, hashes[0], hashes[1], hashes[2], metadata)


def _entry_bytes(tensor: Tensor) -> Tensor:
    """uint8 (entries, bytes an entry)."""
    return tensorfile.raw_bytes(tensor).view(-1, tensor.element_size())


def _changed(tensor: Tensor, change: Change, strength: float) -> Tensor:
    result = tensor.detach().cpu().clone().contiguous()
    flat = result.view(-1)
    patterns = flat.view(_INTEGERS[result.element_size()])
    bits = change.xor.contiguous().view(-1).view(_INTEGERS[result.element_size()])
    if strength == 1.0:
        patterns[change.index] ^= bits
    elif strength != 0.0:
        old = flat[change.index]
        new = (patterns[change.index] ^ bits).view(result.dtype)
        flat[change.index] = (old.float() + strength * (new.float() - old.float())).to(result.dtype)
    return result


def _read_change(where: Tensor, xor: Tensor, dtype: str, shape: list[int], kind: str) -> Change:
    if dtype not in tensorfile.DTYPES or any(type(d) is not int or d < 0 for d in shape):
        raise ValueError(f"no tensor is {dtype} {shape}")
    n, width = prod(shape), tensorfile.DTYPES[dtype].itemsize
    if where.dtype != torch.uint8 or xor.dtype != torch.uint8:
        raise ValueError("planes must be bytes")
    if kind == "bits":
        if len(where) != (n + 7) // 8:
            raise ValueError(f"{len(where)} bytes of bits for {n} entries")
        index = np.flatnonzero(np.unpackbits(where.numpy(), count=n, bitorder="little"))
    elif kind == "index":
        index = where.numpy().view("<u4").astype(np.int64)
        if len(index) and (index[-1] >= n or np.any(np.diff(index) <= 0)):
            raise ValueError("indices out of range or out of order")
    else:
        raise ValueError(f"unknown kind of places {kind!r}")
    if len(xor) != len(index) * width:
        raise ValueError(f"{len(xor)} bytes of changes for {len(index)} entries of {width}")
    return Change(tensorfile.DTYPES[dtype], tuple(shape), torch.from_numpy(index), xor.view(width, -1).T.contiguous())
