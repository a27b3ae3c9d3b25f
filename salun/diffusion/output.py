"""From trained masters to files: the erased tensors in the checkpoint's own dtype, written where the user asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.diffusion.convert import write_folder, write_single_file
from salun.diffusion.models import Model, scoped
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, ModelError
from salun.formats import tensorfile
from salun.formats.applied import BASE_HASH, RESULT_HASH, joined, notes_in
from salun.formats.delta import Delta
from salun.formats.patch import placed, size_of, write_patched
from salun.formats.stock import Account, full_difference, host_metadata, low_rank
from salun.mask import Mask, entries
from salun.options import EraseOptions
from salun.progress import Event, Progress, Told, silent

DELTA, LORA, DIFF = ".salun.safetensors", ".lora.safetensors", ".diff.safetensors"
RUN_FILES = (
    "run.json",
    "mask.safetensors",
    "before_after.png",
    "report.html",
    "log.txt",
    "state",
    ".lock",
    "eval.json",
)
ENERGY = 0.9  # of a low-rank file where nothing else is asked for
STATE_BYTES = 12  # a salient entry's float32 master and Adam's two moments


def erased_tensors(
    original: Mapping[str, Tensor], mask: Mask, masters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The changed tensors: masters rounded once to the file's dtype, every other entry the file's own bits.

    And how many entries training moved (`moved`), how many of these the rounding put back (`rounded_away`), and a
    `warning` where that leaves little or nothing of the erasure, else None.
    """
    erased: dict[str, Tensor] = {}
    counts = {"moved": 0, "rounded_away": 0}
    for name, master in masters.items():
        tensor = original[name].clone()
        flat, chosen, exact = tensor.view(-1), mask.dense(name).view(-1), master.cpu()
        old, new = flat[chosen], exact.to(tensor.dtype)
        differs = exact != old.float()
        counts["moved"] += int(differs.sum())
        counts["rounded_away"] += int((differs & (new == old)).sum())
        flat[chosen] = new
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{name} holds a value that {tensor.dtype} cannot: the learning rate is too high")
        erased[name] = tensor
    return erased, {**counts, "warning": _warning(counts["moved"], counts["rounded_away"])}


def _warning(moved: int, lost: int) -> str | None:
    """Half of what moved is common in fp16, where many steps are below the last place of their weight."""
    if moved and lost < 0.9 * moved:
        return None
    what = "no weight moved" if not moved else f"{lost:,} of the {moved:,} weights that moved"
    if moved:
        what += " did so by less than the file's number format can hold and are as they were"
    if lost == moved:
        what += ", so nothing is erased"
    return f"{what}: take a model in a finer format (fp16, fp32), more --steps, or a larger --lr"


def moved(original: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> Mask:
    """Where masters (all entries of each tensor) differ from the original: the mask that SalUn-soft ends with."""
    return Mask.from_dense(
        {name: master.cpu().view(original[name].shape) != original[name].float() for name, master in masters.items()}
    )


def check_output(target: str, force: bool = False) -> None:
    """Raises ConfigError for an output that would overwrite something or whose format is not known."""
    path = Path(target)
    there = os.path.lexists(path)  # a link that leads nowhere is something too
    if not target.endswith((".safetensors", "/", os.sep)):
        raise ConfigError(
            f"--output {target}: end it in .safetensors (checkpoint), / (diffusers folder), .salun.safetensors "
            "(delta), .lora.safetensors or .diff.safetensors (for stock loaders)"
        )
    if there and not force:
        raise ConfigError(f"--output {target} is there already: choose another name, or add --force")
    folder = target.endswith(("/", os.sep))
    if there and folder and not (path / "model_index.json").is_file():
        raise ConfigError(f"--output {target} is there already and is no diffusers folder: it is not replaced")
    if there and not folder and not path.is_file():
        raise ConfigError(f"--output {target} is there already and is no file: choose another name")


def output_layout(target: str) -> str | None:
    """ "folder" or "file" of a whole model, None for a difference; by its name."""
    if target.endswith(("/", os.sep)):
        return "folder"
    return None if target.endswith((DELTA, LORA, DIFF)) else "file"


def read_beside(options: EraseOptions) -> list[str | None]:
    """What a run reads beside the model, and no output may replace."""
    return [options.components, options.mask, options.forget_images, options.retain_images]


def check_places(model: Model, targets: list[str], run_dir: Path | None, read: Sequence[str | None] = ()) -> None:
    """Raises ConfigError for places that an erasure must not change or replace.

    That is an output or run folder inside the model's own folder, an output that holds the model, the run or something
    else that is read, two outputs in one place, and an output under a name that the run folder needs itself. read:
    names of files and folders that the run reads beside the model.
    """
    source = _real(model.stored.path)
    run = _real(run_dir) if run_dir is not None else None
    places = {target: _real(target) for target in targets}
    flags = {f"--output {target}": place for target, place in places.items()}
    for flag, place in {**flags, **({f"--run-dir {run_dir}": run} if run is not None else {})}.items():
        if source in (place, *place.parents):
            what = "is the model's own file" if model.stored.single else "is inside the model's own folder"
            raise ConfigError(f"{flag} {what}: write somewhere else")
    kept = [Path(name).expanduser() for name in read if name]
    held = [("the model itself", source), ("the run folder", run)]
    held += [(f"{path}, which is read", _real(path)) for path in kept if path.exists()]
    for target, place in places.items():
        if place.is_file() and any(os.path.samefile(place, file) for file in model.stored.files):
            raise ConfigError(f"--output {target} is the model's own file: write somewhere else")
        for what, inner in held:
            if inner is not None and place in (inner, *inner.parents):
                raise ConfigError(f"--output {target} holds {what}: write somewhere else")
        if len([other for other in places.values() if other in (place, *place.parents)]) > 1:
            raise ConfigError(f"--output {target} lies in the place of another output: write them side by side")
        if run is not None and run in place.parents and place.relative_to(run).parts[0] in RUN_FILES:
            raise ConfigError(f"--output {target} has a name that the run folder needs itself: take another")


def _real(path: Path | str) -> Path:
    """Without links, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


def disk_needed(model: Model, plan: Plan, outputs: list[str], run_dir: Path | None) -> dict[Path, int]:
    """Place → bytes that a run takes there at most.

    Each output in its own place, without any in the run folder, where mask and the state to resume from are too: that
    twice, as it is renewed.
    """
    unet = sum(entry.end - entry.start for entry in map(model.stored.entry, model.stored))
    whole = size_of(model.stored)
    total = sum(p.numel() for p in scoped(model.parameters(), plan.options.scope).values())
    salient = entries(total, plan.options.density) if plan.options.method == "salun" else total
    delta = total // 8 + unet  # at most: the bits of all entries and every changed one
    stock = 4 * total  # bytes: two for each entry of a full difference; of full rank a square matrix takes it twice
    needed = {
        Path(name): delta if name.endswith(DELTA) else stock if name.endswith((LORA, DIFF)) else whole
        for name in outputs
    }
    if run_dir is not None:
        needed[run_dir] = total // 8 + 2 * STATE_BYTES * salient + (0 if outputs else whole + delta)
    return needed


def write_output(
    target: str,
    model: Model,
    erased: Mapping[str, Tensor],
    delta: Delta,
    notes: Mapping[str, str],
    keep_ema: bool = False,
    progress: Progress = silent,
) -> str:
    """Write one output, its format chosen by its name; returns its kind. Nothing is left behind if it fails.

    `x.salun.safetensors`: the sparse delta. `x.lora.safetensors`, `x.diff.safetensors`: low-rank and full differences
    for stock loaders. `x/`: a diffusers folder. Any other `x.safetensors`: a single-file checkpoint. In the model's own
    layout all but the UNet's changed tensors is copied byte for byte, in the other one it is converted.
    """
    path = Path(target)
    if target.endswith(DELTA):
        delta.save(path)
        return "delta"
    if target.endswith((LORA, DIFF)):
        write_stock(path, model.stored, erased, stock_notes(delta), progress=progress)
        return "difference" if target.endswith(DIFF) else "lora"
    folder = output_layout(target) == "folder"
    if folder != model.stored.single:
        write_patched(model.stored, path, erased, notes, keep_ema)
    elif folder:
        write_folder(model, path, erased, notes)
    else:
        write_single_file(model, path, erased, notes)
    return "folder" if folder else "checkpoint"


def stock_notes(delta: Delta) -> dict[str, str]:
    """Metadata of a stock loader's file: what the delta says of itself, and which it is."""
    own = {"salun.delta": delta.id, BASE_HASH: delta.base_hash, RESULT_HASH: delta.result_hash}
    return {**joined([notes_in(delta.metadata)]), **own}


def write_stock(
    path: Path,
    base: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    notes: Mapping[str, str],
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = silent,
) -> Account | None:
    """Write a stock loader's file, low-rank or full by its name; returns what a low-rank one holds.

    base: the whole UNet. changed: its tensors that differ, as they are to be. rank, energy: of the low-rank file, as in
    `low_rank`; without either, ranks that keep 90 % of the difference.
    """
    told = Told(changed, "comparing", progress)
    held = {**notes, **host_metadata(base)}
    if path.name.endswith(DIFF):
        made = full_difference(base, told)
        made = replace(made, changed=changed)  # (from here on it is the writing that is told)
        tensorfile.write_lazily(path, made.described, Told(made, "writing", progress), held)
        return None
    tensors, account = low_rank(base, told, rank=rank, energy=ENERGY if rank is energy is None else energy)
    tensorfile.write(path, tensors, {**held, "salun.energy_kept": f"{account.total.share:.6f}"})
    if account.warning:
        progress(Event("writing", message=f"{path.name}: {account.warning}"))
    return account


def write_new(
    target: str,
    model: Model,
    erased: Mapping[str, Tensor],
    delta: Delta,
    notes: Mapping[str, str],
    keep_ema: bool = False,
    progress: Progress = silent,
) -> str:
    """`write_output`, to a name that must be free or hold these very bytes (of a run that stopped after writing it).

    Raises ConfigError if something else is there by now.
    """
    ending = os.sep if target.endswith(("/", os.sep)) else ""
    with placed(Path(target), again=True) as place:
        return write_output(f"{place}{ending}", model, erased, delta, notes, keep_ema, progress)
