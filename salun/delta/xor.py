"""What changed in one tensor: which entries, and the XOR of their old and new bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from salun.checkpoints import safetensors_io

KINDS = ("bits", "index")
_PATTERNS = {1: "u1", 2: "<i2", 4: "<i4", 8: "<i8"}  # bytes an entry → numpy's integer for its bits
_MAX_RANK, _MAX_SIDE = 8, 1 << 40  # of a tensor that a file claims
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Change:
    """What changed in one tensor of n entries, as its file holds it.

    Args:
        kind: Of `indices`: "bits" or "index".
        indices: uint8: packed bits (⌈n/8⌉,), lowest first, or flat rising indices, little-endian uint32 (4k,).
        planes: uint8 (bytes an entry, k), the XOR of old and new bits, lowest bytes first.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    indices: np.ndarray
    planes: np.ndarray

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> Change | None:
        """None if no bit differs. The tensors are of one dtype and shape."""
        xor = patterns(old) ^ patterns(new)
        chosen = xor != 0
        bits = xor[chosen]
        if not len(bits):
            return None
        kind = "bits" if (len(xor) + 7) // 8 <= 4 * len(bits) or len(xor) > 1 << 32 else "index"
        if kind == "bits":
            indices = np.packbits(chosen, bitorder="little")
        else:
            indices = np.flatnonzero(chosen).astype("<u4").view(np.uint8)
        planes = np.ascontiguousarray(bits.view(np.uint8).reshape(len(bits), -1).T)
        return cls(old.dtype, tuple(old.shape), kind, indices, planes)

    @classmethod
    def checked(cls, dtype: str, shape: list[int], kind: str, where: Tensor, xor: Tensor) -> Change:
        """From an untrusted file. Raises ValueError, KeyError or TypeError for what does not hold together."""
        if len(shape) > _MAX_RANK or any(type(side) is not int or not 0 <= side <= _MAX_SIDE for side in shape):
            raise ValueError(f"invalid shape {str(shape)[:80]}")
        if where.dtype != torch.uint8 or xor.dtype != torch.uint8 or kind not in KINDS:
            raise ValueError("its indices or planes are of an unknown kind")
        n, indices = prod(shape), where.view(-1).numpy()
        planes = xor.numpy().reshape(safetensors_io.DTYPES[dtype].itemsize, -1)
        if kind == "index":
            index = indices.view("<u4")
            if np.any(index[1:] <= index[:-1]) or (len(index) and index[-1] >= n):
                raise ValueError("indices out of range or out of order")
        elif len(indices) != (n + 7) // 8 or (n % 8 and indices[-1] >> n % 8):
            raise ValueError(f"{len(indices)} bytes of bits for {n} entries, or bits past the last")
        if planes.shape[1] != (k := len(index) if kind == "index" else _ones(indices)):
            raise ValueError(f"{planes.size} bytes of changes for {k} entries of {len(planes)} bytes")
        return cls(safetensors_io.DTYPES[dtype], tuple(shape), kind, indices, planes)

    @property
    def count(self) -> int:
        """Entries that changed."""
        return int(self.planes.shape[1])

    def as_index(self) -> np.ndarray:
        """Index of the changed entries in a flat array: bool (n,) or uint32 (k,)."""
        if self.kind == "index":
            return self.indices.view("<u4")
        return np.unpackbits(self.indices, count=prod(self.shape), bitorder="little").view(np.bool_)

    def xor(self) -> np.ndarray:
        """Old XOR new bits of the changed entries, integers (k,)."""
        return np.ascontiguousarray(self.planes.T).view(_PATTERNS[self.dtype.itemsize]).ravel()

    def xor_bits(self, tensor: Tensor) -> np.ndarray:
        """Bits (k,) that the changed entries have after, from a tensor before, or the other way round."""
        return np.asarray(patterns(tensor)[self.as_index()] ^ self.xor())

    def apply(self, tensor: Tensor) -> Tensor:
        """A new tensor: the one after from the one before, or the other way round."""
        result = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        bits = patterns(result)
        spread = np.zeros_like(bits)
        spread[self.as_index()] = self.xor()
        bits ^= spread  # twice as fast as to pick and put back
        return result

    def difference(self, old: Tensor) -> Tensor:
        """new − old of the changed entries, float32 (k,)."""
        return values(self.xor_bits(old), self.dtype) - values(patterns(old)[self.as_index()], self.dtype)

    def overlap_count(self, other: Change) -> int:
        """Number of entries that both changes of a tensor have."""
        if self.kind == other.kind == "bits":
            return _ones(self.indices & other.indices)
        if self.kind == other.kind:
            return len(np.intersect1d(self.as_index(), other.as_index(), assume_unique=True))
        few, many = (self, other) if self.kind == "index" else (other, self)
        index = few.as_index()
        return int((many.indices[index >> 3] >> (index & 7) & 1).sum(dtype=np.int64))


def patterns(tensor: Tensor) -> np.ndarray:
    """The entries' bits as flat integers; a CPU tensor's own memory if it is contiguous."""
    return safetensors_io.raw_bytes(tensor).numpy().view(_PATTERNS[tensor.element_size()])


def values(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Entries as float32, from their bits."""
    return torch.from_numpy(bits).view(dtype).float()


def _ones(bits: np.ndarray) -> int:
    """How many bits of packed ones are set."""
    return int(_ONES[bits].sum(dtype=np.int64))
