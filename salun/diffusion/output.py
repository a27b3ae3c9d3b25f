"""From trained masters to files: the erased tensors in the checkpoint's own dtype, written where the user asked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from salun.diffusion.models import Model
from salun.errors import ConfigError, ModelError
from salun.formats import tensorfile
from salun.formats.delta import Delta
from salun.formats.tensorfile import remove_leftovers, sha256_file
from salun.mask import Mask


def erased_tensors(original: Mapping[str, Tensor], mask: Mask, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changed tensors: masters rounded once to the file's dtype, every other entry the file's own bits."""
    erased = {}
    for name, master in masters.items():
        tensor = original[name].clone()
        tensor.view(-1)[mask.dense(name).view(-1)] = master.cpu().to(tensor.dtype)
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds a value that {tensor.dtype} cannot: the learning rate is too high")
        erased[name] = tensor
    return erased


def moved(original: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> Mask:
    """Where masters (all entries of each tensor) differ from the original: the mask that SalUn-soft ends with."""
    return Mask.from_dense(
        {name: master.cpu().view(original[name].shape) != original[name].float() for name, master in masters.items()}
    )


def check_output(target: str, force: bool = False) -> None:
    """Raises ConfigError for an output that would overwrite something or whose format is not known."""
    path = Path(target)
    if target.endswith((".lora.safetensors", ".diff.safetensors")):
        raise ConfigError(
            f"--output {target}: LoRA and full-difference files are not written yet; use .salun.safetensors"
        )
    if not target.endswith((".safetensors", "/", os.sep)):
        raise ConfigError(
            f"--output {target}: end it in .safetensors (UNet), .salun.safetensors (delta) or / (diffusers folder)"
        )
    if path.exists() and not force:
        raise ConfigError(f"--output {target} is there already: choose another name, or add --force")


def write_output(
    target: str, model: Model, erased: Mapping[str, Tensor], delta: Delta, notes: Mapping[str, str]
) -> str:
    """Write one output, its format chosen by its name; returns its kind. Nothing is left behind if it fails.

    `x.salun.safetensors`: the sparse delta. `x/`: a copy of the diffusers folder with the erased UNet.
    `x.safetensors`: the UNet's weight file in the folder's own layout.
    """
    if target.endswith(".salun.safetensors"):
        delta.save(Path(target))
        return "delta"
    if target.endswith(("/", os.sep)):
        _write_folder(Path(target), model, erased, notes)
        return "folder"
    if len(model.unet_files) > 1:
        raise ConfigError(f"{model.name} keeps its UNet in several files: write a diffusers folder (--output name/)")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    tensorfile.rewrite(model.unet_files[0], Path(target), erased, notes)
    return "unet"


def write_new(target: str, model: Model, erased: Mapping[str, Tensor], delta: Delta, notes: Mapping[str, str]) -> str:
    """`write_output`, to a name that must be free or hold these very bytes (of a run that stopped after writing it).

    Raises ConfigError if something else is there by now.
    """
    path = Path(target)
    remove_leftovers(path)
    if not path.exists():
        return write_output(target, model, erased, delta, notes)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
        again = Path(beside) / path.name
        kind = write_output(
            str(again) + (os.sep if target.endswith(("/", os.sep)) else ""), model, erased, delta, notes
        )
        if _contents(again) != _contents(path):
            raise ConfigError(f"--output {target} is there already: choose another name, or add --force")
    return kind


def _contents(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def _write_folder(target: Path, model: Model, erased: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        replaced = {file.resolve() for file in model.unet_files}
        for source in sorted(p for p in model.folder.rglob("*") if p.is_file()):
            copy = temporary / source.relative_to(model.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.resolve() in replaced:
                inside = set(tensorfile.read_header(source).names)
                tensorfile.rewrite(source, copy, {n: t for n, t in erased.items() if n in inside}, notes)
            else:
                shutil.copyfile(source, copy)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
