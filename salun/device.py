"""Which device and which dtype to compute in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from salun.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(wish: str) -> torch.device:
    """`auto` is the first GPU there is, else the CPU. Raises ConfigError for a device this machine does not have."""
    if wish == "auto":
        if torch.cuda.is_available():
            own = os.environ.get("LOCAL_RANK")  # set by accelerate's launcher: a GPU for each process
            return torch.device("cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}")
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


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Within, torch uses kernels that give the same bits each time; where there are none, it warns.

    CUDA's matrix products need CUBLAS_WORKSPACE_CONFIG for that, set here if nothing has set it and CUDA has not begun.
    """
    if not deterministic:
        yield
        return
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        torch.utils.deterministic.fill_uninitialized_memory = before[3]  # type: ignore[attr-defined]
