"""Whether a module that an untrusted config describes is about as large as its weight files, before it is built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from salun.errors import ModelError

PARTS = 20_000  # modules and parameters; SDXL's UNet has 5,500
SPARE = 1_000_000  # parameters that files need not hold, such as a new head's


def check_size(make: Callable[[], Any], held: int, path: Path) -> None:
    """Raises ModelError if what a config describes cannot be built, or is far larger than what its files hold.

    make: builds the module; called without memory for parameters. held: entries of the files' tensors. (Up to twice as
    many, loading reports which tensors are missing, and needs no more memory than such a model does.) path: the config.
    """
    try:
        with torch.device("meta"), _bounded():
            module = make()
    except Exception as error:  # the libraries raise many kinds; each means that the config describes no such module
        raise ModelError(f"no model can be built from {path}: {first_line(error)}") from error
    wanted = sum(parameter.numel() for parameter in module.parameters())
    if wanted > 2 * held + SPARE:
        raise ModelError(
            f"{path} describes {wanted:,} parameters, but its weight files hold {held:,}: they do not belong together"
        )


@contextmanager
def _bounded() -> Iterator[None]:
    """Context manager: this thread cannot build a module of more than `PARTS` modules and parameters."""
    count, thread = 0, threading.get_ident()

    def counted(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > PARTS:
                raise ValueError(f"it describes more than {PARTS:,} modules and parameters")

    hooks = [register_module_module_registration_hook(counted), register_module_parameter_registration_hook(counted)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_line(error: BaseException) -> str:
    """The first line of an error that a library raised, as a message can hold it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
