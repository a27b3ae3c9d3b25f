"""The base hash: which model is this? It depends on the UNet's tensors alone, not on the file that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from salun.checkpoints.safetensors_io import NAMES, raw_bytes


def base_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hex, over the tensors sorted by name.

    Each is fed as "name\\0dtype\\0d0,d1,…\\0" in UTF-8, then its bytes; dtype in
    safetensors' names (F16, …). The mapping may read its tensors lazily: one is held at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


class Hasher:
    """`base_hash`, fed one tensor at a time in the order of their names.

    rounded: whether `fp16`, the hash over the tensors rounded to fp16, is wanted too.
    """

    def __init__(self, rounded: bool = False) -> None:
        self._exact = hashlib.sha256()
        self._rounded = rounded
        self._half: hashlib._Hash | None = None  # from the first tensor on that rounding changes

    def add(self, name: str, tensor: Tensor) -> None:
        rounds = tensor.is_floating_point() and tensor.dtype != torch.float16
        if self._rounded and rounds and self._half is None:
            self._half = self._exact.copy()
        _feed(self._exact, name, tensor)
        if self._half is not None:
            _feed(self._half, name, tensor.to(torch.float16) if rounds else tensor)

    def copy(self) -> Hasher:
        """An independent copy."""
        twin = Hasher(self._rounded)
        twin._exact, twin._half = self._exact.copy(), self._half.copy() if self._half else None
        return twin

    @property
    def hash(self) -> str:
        """The base hash, in hex."""
        return self._exact.hexdigest()

    @property
    def fp16(self) -> str:
        """The hash over the rounded tensors, in hex, if it was wanted."""
        return (self._half or self._exact).hexdigest()


def _feed(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    shape = ",".join(str(d) for d in tensor.shape)
    digest.update(f"{name}\0{NAMES[tensor.dtype]}\0{shape}\0".encode())
    digest.update(raw_bytes(tensor).numpy().data)
