"""Random numbers: every purpose draws from a stream of its own, so that no two draws of one seed go together."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits that depends on a run's seed and on what is drawn, such as ("unlearning", epoch)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))
