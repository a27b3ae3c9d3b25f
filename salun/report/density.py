"""How many weights of each block are selected: one table behind charts, images and text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
N = TypeVar("N", bound=Hashable)


def summed(counts: Mapping[N, tuple[int, int]], key: Callable[[N], K]) -> dict[K, tuple[int, int]]:
    """(selected, total) of parameters summed over those of an equal key, in the order of the first of each."""
    sums: dict[K, tuple[int, int]] = {}
    for name, (selected, total) in counts.items():
        before = sums.get(key(name), (0, 0))
        sums[key(name)] = (before[0] + selected, before[1] + total)
    return sums


def per_block(counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """(selected, total) of each block of a UNet. counts: parameter → (selected, total), in module order."""
    return summed(counts, block_of)


def block_of(name: str) -> str:
    """The block of a UNet parameter: down_blocks.0.attentions, mid_block.resnets, time_embedding, …"""
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if parts[0] == "mid_block" else parts[0]
