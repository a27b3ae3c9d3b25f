"""Random numbers: each purpose draws from a stream that depends on the seed and the purpose, so no two are related."""

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


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator of one training step of a diffusion model."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 7_919 + 17) % (1 << 63))
