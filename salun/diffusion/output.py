"""From trained masters to files: the erased tensors in the checkpoint's own dtype, written where the user asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.outputs import DELTA, DIFF, LORA, output_layout
from salun.checkpoints.patch import write_patched
from salun.delta.delta import Delta
from salun.delta.stock_formats import stock_notes, write_stock
from salun.diffusion.model.convert import write_folder, write_single_file
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ModelError
from salun.files import placed
from salun.masking.mask import Mask
from salun.progress import Progress, silent


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
