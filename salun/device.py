"""Which device and which dtype to compute in."""

from __future__ import annotations

import torch

from salun.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(wish: str) -> torch.device:
    """`auto` is the first GPU there is, else the CPU. Raises ConfigError for a device this machine does not have."""
    if wish == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {wish} is not there on this machine: use cpu, or auto") from error
    return device


def pick_dtype(wish: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU that has it, else fp32."""
    if wish != "auto":
        return DTYPES[wish]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
