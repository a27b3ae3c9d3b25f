"""From trained masters to files: the erased tensors in the checkpoint's own dtype, written where the user asked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from salun.diffusion.models import Model, scoped
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, ModelError
from salun.formats import tensorfile
from salun.formats.delta import Delta
from salun.formats.tensorfile import remove_leftovers, sha256_file
from salun.mask import Mask, entries

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".onnx_data", ".pb", ".msgpack", ".h5", ".gguf")
STATE_BYTES = 12  # a salient entry's float32 master and Adam's two moments


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
    folder = target.endswith(("/", os.sep))
    if path.exists() and folder and not (path / "model_index.json").is_file():
        raise ConfigError(f"--output {target} is there already and is no diffusers folder: it is not replaced")
    if path.exists() and not folder and not path.is_file():
        raise ConfigError(f"--output {target} is there already and is no file: choose another name")


def left_out(model: Model) -> list[Path]:
    """Files of a diffusers folder that an erased copy must not have: other copies of the UNet's weights.

    They would still hold the concept: other variants beside the ones that are erased, and whole checkpoints at the top.
    """
    replaced = {file.resolve() for file in model.unet_files}
    candidates = [p for place in (model.folder, model.folder / "unet") for p in place.iterdir() if p.is_file()]
    names = {file.name for file in model.unet_files}
    return [
        p
        for p in sorted(candidates)
        if p.resolve() not in replaced
        and (p.suffix in WEIGHTS or (p.name.endswith(".index.json") and len(names) == 1 and p.parent.name == "unet"))
    ]


def check_places(model: Model, targets: list[str], run_dir: Path | None) -> None:
    """Raises ConfigError for places that an erasure must not change or replace.

    That is an output or run folder inside the model's own folder, and an output that holds the model or the run.
    """
    source = model.folder.resolve()
    for flag, place in [("--output", Path(target)) for target in targets] + [("--run-dir", run_dir)]:
        if place is not None and source in (place.resolve(), *place.resolve().parents):
            raise ConfigError(f"{flag} {place} is inside the model's own folder: write somewhere else")
    for target in targets:
        for what, inner in (("the model itself", source), ("the run folder", run_dir and run_dir.resolve())):
            if inner is not None and Path(target).resolve() in (inner, *inner.parents):
                raise ConfigError(f"--output {target} holds {what}: write somewhere else")


def disk_needed(model: Model, plan: Plan, outputs: list[str]) -> int:
    """Bytes that a run takes on disk at most: outputs, mask, and the state to resume from, twice as it is renewed."""
    unet = sum(file.stat().st_size for file in model.unet_files)
    folder = sum(p.stat().st_size for p in model.folder.rglob("*") if p.is_file())
    total = sum(p.numel() for p in scoped(model.parameters(), plan.options.scope).values())
    salient = entries(total, plan.options.density) if plan.options.method == "salun" else total
    delta = total // 8 + unet  # at most: the bits of all entries and every changed one
    kinds = outputs or ["model/", "x.salun.safetensors"]
    written = sum(
        folder if name.endswith("/") else delta if name.endswith(".salun.safetensors") else unet for name in kinds
    )
    return written + total // 8 + 2 * STATE_BYTES * salient


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
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    remove_leftovers(target)
    unwanted = set(left_out(model))
    try:
        replaced = {file.resolve() for file in model.unet_files}
        for source in sorted(p for p in model.folder.rglob("*") if p.is_file() and p not in unwanted):
            copy = temporary / source.relative_to(model.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.resolve() in replaced:
                inside = set(tensorfile.read_header(source).names)
                tensorfile.rewrite(source, copy, {n: t for n, t in erased.items() if n in inside}, notes)
            else:
                shutil.copyfile(source, copy)
        if target.exists():  # moved aside until the new one is in its place
            os.replace(target, aside)
        os.replace(temporary, target)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}): make room or write elsewhere"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
