"""`.ckpt` files: pickles, which can run code when unpacked. Read only if allowed, and by torch's safe unpickler."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from salun import files
from salun.checkpoints import safetensors_io
from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.signature import DOWNLOAD_AGAIN, PICKLE, UNKNOWN, advice, kind_of
from salun.errors import ModelError
from salun.files import sha256_file
from salun.runs.cache import Cache

ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
SAFE = (2, 6)  # the first torch whose weights_only runs no code (CVE-2025-32434)
SOUND = (2, 10)  # the first one without memory corruption by hostile opcodes (CVE-2026-24747)
HARMLESS = (  # what trainers store in a checkpoint with its weights: their state, options, paths, NumPy scalars
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib.PureWindowsPath",
)
LARGEST = 2  # bytes of tensors that one byte of a checkpoint may become: more than one where names share their weights
DIGEST = ".sha256"  # ending of the file that records the digest of a converted one
logger = logging.getLogger("salun")


def as_safetensors(path: Path, allowed: bool) -> Path:
    """The file itself, or what `convert_pickle` makes of a pickle. Raises ModelError as that does."""
    return convert_pickle(path, allowed) if path.suffix.lower() in ENDINGS and path.is_file() else path


def check_torch() -> None:
    """Raises ModelError for a torch whose safe unpickler runs code (before 2.6); warns of one that it can corrupt."""
    version = Version(torch.__version__)
    release = version.release[:2]
    if release < SAFE:
        raise ModelError(
            f"pickles need torch {'.'.join(map(str, SAFE))} or later, but this is {version.public}: in older versions "
            "they can run code even with weights_only (CVE-2025-32434)",
            advice="Use the model's .safetensors file, or update torch",
        )
    if release < SOUND:
        logger.warning(
            "with torch %s a pickle can corrupt memory even under weights_only (CVE-2026-24747): update to %s or later "
            "before you open an untrusted one",
            version.public,
            ".".join(map(str, SOUND)),
        )


def convert_pickle(path: Path, allowed: bool) -> Path:
    """A safetensors file of the same stem with a pickled checkpoint's tensors, in the user's cache; made once.

    Names and bytes stay; other values (training state) are dropped. Raises ModelError for a file that is not a pickle,
    where pickles are not allowed, or if the file holds anything but tensors and plain values.
    """
    kind = kind_of(path)
    if kind == UNKNOWN:
        raise ModelError(f"{path} is not a readable checkpoint", advice=advice(kind))
    if kind != PICKLE:
        raise ModelError(f"{path} is {kind}, not a pickle as its name says", advice=advice(kind))
    if not allowed:
        raise ModelError(
            f"{path} is a pickle, which can execute arbitrary code",
            advice="Use a .safetensors file of the same model, or, if you trust this file, {allow_pickle} (it is read "
            "with weights_only)",
            code="pickle",
        )
    target = Cache.of_user().converted / sha256_file(path)[:24] / f"{path.stem}.safetensors"
    if _is_recorded(target):
        return target
    check_torch()
    tensors = _tensors(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors_io.write(target, tensors)
    files.write_bytes(_record(target), sha256_file(target).encode())
    return target


def _record(target: Path) -> Path:
    return target.with_name(target.name + DIGEST)


def _is_recorded(target: Path) -> bool:
    """Whether a converted file is there, with the digest that was recorded when it was written."""
    if not target.is_file():
        return False
    try:
        if _record(target).read_bytes()[:100].decode("ascii", "replace") == sha256_file(target):
            return True
    except OSError:
        pass
    logger.warning("%s in the cache is damaged and will be converted again", target.name)
    return False


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint. Raises ModelError as `convert_pickle`."""
    _check_archive(path)
    try:
        with _allow_harmless_globals():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_zipped(path))
    except (
        Exception
    ) as error:  # torch and pickle raise many kinds; each means that this checkpoint is not to be trusted
        raise ModelError(f"{path} cannot be read as a checkpoint: {_why(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            if str(name) in tensors:
                raise ModelError(f"{path} has two tensors named {truncated(str(name))!r}", advice=DOWNLOAD_AGAIN)
            tensors[str(name)] = value
    if not tensors:
        raise ModelError(f"{path} is not a checkpoint of a model: it has no tensors")
    _check_tensors(path, tensors)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check_archive(path: Path) -> None:
    """Raises ModelError for a zip archive that would unpack to more than its size; torch's own are not compressed."""
    if not _zipped(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path} is damaged or truncated", advice=DOWNLOAD_AGAIN) from error
    if size > path.stat().st_size:
        raise ModelError(f"{path} is compressed, which torch's files never are: it would unpack to {size:,} bytes")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError for tensors that safetensors cannot hold, or that take far more room than the checkpoint."""
    for name, tensor in tensors.items():
        what = truncated(name)
        if tensor.dtype not in safetensors_io.NAMES:
            raise ModelError(f"{path}: {what} has the unsupported dtype {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ModelError(f"{path}: {what} is not a dense tensor, as weights are")
        if name == "__metadata__" or name.encode("utf-8", "replace").decode("utf-8") != name:
            raise ModelError(f"{path} has a tensor with the invalid name {what!a}")
    size, there = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()), path.stat().st_size
    if size > LARGEST * there:
        raise ModelError(f"{path} is damaged: it has {there:,} bytes, but its tensors would take {size:,}")


def _allow_harmless_globals() -> AbstractContextManager[Any]:
    """Context manager: torch's unpickler ignores the names of `HARMLESS`."""
    allowed = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    return allowed([_stand_in(name) for name in HARMLESS]) if allowed else nullcontext()


def _stand_in(name: str) -> type:
    """A class of this name that takes anything and does nothing, in place of the one that a pickle names."""
    module, _, last = name.rpartition(".")
    ignore = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    return type(last, (), {"__module__": module, **ignore})


def _why(error: Exception) -> str:
    """The reason in one line. (torch's own is a page on how to switch its guard off, which nobody should.)"""
    text = str(error).strip()
    foreign = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    if foreign:
        return f"besides weights it holds a {foreign[1]}, not a tensor; use a .safetensors file of the same model"
    reason = text.partition("WeightsUnpickler error:")[2].strip() or text
    line = reason.splitlines()[0].strip() if reason else type(error).__name__
    if re.search(r"weights_only|torch\.load|trust", line):
        return "it is damaged, or holds more than weights; use a .safetensors file of the same model"
    return truncated(line)


def _zipped(path: Path) -> bool:
    """Whether torch's newer, zipped format: only that can be mapped rather than read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
