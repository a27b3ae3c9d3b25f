"""`.ckpt` files: pickles, which can run code when unpacked. Read only when asked to, and by torch's safe unpickler."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.cache import Cache
from salun.errors import ModelError
from salun.formats import tensorfile
from salun.formats.tensorfile import sha256_file

ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
SAFE = (2, 6)  # the first torch whose weights_only runs no code (CVE-2025-32434)
HARMLESS = (  # what trainers leave in a checkpoint beside its weights, as the key of their own state
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


def readable(path: Path, allowed: bool) -> Path:
    """The file itself, or what `converted` makes of a pickle. Raises ModelError as that does."""
    return converted(path, allowed) if path.suffix.lower() in ENDINGS and path.is_file() else path


def check_torch() -> None:
    """Raises ModelError for a torch whose safe unpickler can be made to run code (CVE-2025-32434, before 2.6)."""
    version = torch.__version__.split("+")[0]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < SAFE:
        raise ModelError(
            f"--allow-pickle needs torch {'.'.join(map(str, SAFE))} or later, and this is {version}: in older ones a "
            "pickle can run code all the same (CVE-2025-32434). Take the model's .safetensors, or update torch"
        )


def converted(path: Path, allowed: bool) -> Path:
    """A safetensors file of the same stem with a pickled checkpoint's tensors, in the user's cache; made once.

    Names and bytes stay, what is no tensor (training state) goes. Raises ModelError where it is not allowed, or if
    the file holds anything but tensors and plain values.
    """
    if not allowed:
        raise ModelError(
            f"{path} is a pickle, which may run code of whoever made it: take a .safetensors of the same model, or, if "
            "you trust the file, --allow-pickle (it is read with weights_only)"
        )
    check_torch()
    target = Cache.of_user().converted / sha256_file(path)[:24] / f"{path.stem}.safetensors"
    if target.is_file():
        return target
    try:
        with _known():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:  # torch and pickle raise many kinds; each means that this is no checkpoint to trust
        raise ModelError(f"{path} cannot be read as a checkpoint: {_why(error)}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {str(name): tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    strange = next((name for name, tensor in tensors.items() if tensor.dtype not in tensorfile.NAMES), None)
    if not tensors or strange is not None:
        raise ModelError(f"{path} holds {strange or 'no tensors'}{', of a dtype salun does not know' * bool(strange)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    tensorfile.write(target, tensors)
    return target


def _known() -> AbstractContextManager[Any]:
    """While it lasts, torch's unpickler passes over the names of `HARMLESS`."""
    allowed = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    return allowed([_stand_in(name) for name in HARMLESS]) if allowed else nullcontext()


def _stand_in(name: str) -> type:
    """A class of this name that does nothing, in place of the one that a pickle names."""
    module, _, last = name.rpartition(".")
    return type(last, (), {"__module__": module})


def _why(error: Exception) -> str:
    """The reason in one line. (torch's own is a page on how to switch its guard off.)"""
    text = str(error).strip()
    foreign = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    if foreign:
        return f"beside weights it holds a {foreign[1]}, which would run code; take a .safetensors of the same model"
    return text.splitlines()[0] if text else type(error).__name__


def _zipped(path: Path) -> bool:
    """Whether torch's newer, zipped format: only that can be mapped rather than read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
