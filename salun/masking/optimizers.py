"""The optimizers of masked training that an option names."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from salun.errors import ConfigError
from salun.extras import install_command
from salun.masking.training import MakeOptimizer


def check_optimizer(name: str) -> None:
    """Raises ConfigError if an optimizer's library is not installed."""
    if name == "adam8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "is adam8bit, but bitsandbytes is not installed",
            option="optimizer",
            advice=f"Install it: {install_command('bitsandbytes')}, or use adam",
            code="no-bitsandbytes",
        )


def adam(name: str, lr: float, parameters: Mapping[str, nn.Parameter], cpu_offload: bool = False) -> MakeOptimizer:
    """Adam of masked training: torch's, or for "adam8bit" bitsandbytes', whose moments take a quarter of the memory.

    Args:
        parameters: What is trained; torch's Adam is fused where it can be on their devices.
        cpu_offload: Whether master weights and moments stay in CPU memory.
    """
    devices = {"cpu"} if cpu_offload else {p.device.type for p in parameters.values()}
    fused = devices <= {"cpu", "cuda"}  # where torch has an Adam in one kernel

    def make(masters: Iterable[nn.Parameter]) -> Optimizer:
        if name != "adam8bit":
            return torch.optim.Adam(masters, lr=lr, fused=fused)
        from bitsandbytes.optim import Adam8bit

        optimizer: Optimizer = Adam8bit(masters, lr=lr)
        return optimizer

    return make
