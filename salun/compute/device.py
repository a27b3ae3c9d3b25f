"""Choice of device and dtype, and deterministic kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from salun.errors import ConfigError, TrainingError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fix_cublas() -> None:
    """Make CUDA's matrix products deterministic. Takes effect only before the first one of the process.

    A setting in the environment stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first GPU, else the CPU. Raises ConfigError for one that is not available."""
    fix_cublas()
    if name == "auto":
        if torch.cuda.is_available():
            rank = os.environ.get("LOCAL_RANK")  # set by accelerate's launcher: a GPU for each process
            return torch.device("cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"is {name}, which is not available", option="device", advice="Use cpu or auto") from error
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. The host does not wait for the copy to a GPU: it comes from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def finish_copies(source: torch.device, target: torch.device) -> None:
    """Wait for copies from a GPU to CPU memory, which `non_blocking` does not."""
    if source.type == "cuda" and target.type == "cpu" and torch.cuda.is_available():
        torch.cuda.current_stream(source).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that GPU or CPU memory ran out."""
    kinds: tuple[type[BaseException], ...] = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory", "out of memory")
    )


@contextmanager
def explained_memory_errors(message: str, advice: str) -> Iterator[None]:
    """Context manager: running out of memory becomes a TrainingError of the code "out-of-memory" with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(message, advice=advice, code="out-of-memory") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bf16 on a GPU that supports it, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32  # older GPUs only emulate it


@contextmanager
def any_order() -> Iterator[None]:
    """Context manager: kernels whose result does not depend on the order of their writes here, such as those that copy
    to distinct indices, need not be deterministic ones, for which torch sorts the indices on a GPU."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


@contextmanager
def deterministic_kernels(deterministic: bool) -> Iterator[None]:
    """Context manager: torch uses deterministic kernels where available, and warns elsewhere."""
    if not deterministic:
        yield
        return
    memory = getattr(torch.utils, "deterministic", None)  # since torch 2.2
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        getattr(memory, "fill_uninitialized_memory", True),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    if memory is not None:
        memory.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        if memory is not None:
            memory.fill_uninitialized_memory = before[3]
