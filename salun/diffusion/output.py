"""From master weights to files: the erased tensors in the checkpoint's dtype, written to the outputs."""

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
    """The changed tensors: masters rounded once to the file's dtype, every other entry bit-identical to the file's.

    Returns:
        The tensors, and a summary: how many entries training `changed`, how many of these were `lost_to_rounding`, and
        a `warning` where that leaves little or nothing of the erasure, else None.
    """
    erased: dict[str, Tensor] = {}
    counts = {"changed": 0, "lost_to_rounding": 0}
    for name, master in masters.items():
        tensor = original[name].clone()
        flat, chosen, exact = tensor.view(-1), mask.dense(name).view(-1), master.cpu()
        old, new = flat[chosen], exact.to(tensor.dtype)
        differs = exact != old.float()
        counts["changed"] += int(differs.sum())
        counts["lost_to_rounding"] += int((differs & (new == old)).sum())
        flat[chosen] = new
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{name} overflows {tensor.dtype}", advice="Use a smaller {lr}")
        erased[name] = tensor
    return erased, {**counts, "warning": _warning(counts["changed"], counts["lost_to_rounding"])}


def _warning(changed: int, lost: int) -> str | None:
    """Losing half is common in fp16, where many steps are smaller than half a unit in a weight's last place."""
    if changed and lost < 0.9 * changed:
        return None
    what = "training changed no weight"
    if changed:
        what = f"{lost:,} of {changed:,} trained weights changed by less than the file's number format resolves"
    if lost == changed:
        what += ", so nothing is erased"
    return f"{what}. Use a model in a finer format (fp16, fp32), more steps, or a larger lr"


def mask_of_changed(original: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mask:
    """Where weights (float32, all entries of each tensor) differ from the original; nowhere in tensors without any."""
    return Mask.from_dense(
        {
            name: weights[name].cpu().view(tensor.shape) != tensor.float()
            if name in weights
            else torch.zeros(tensor.shape, dtype=torch.bool)
            for name, tensor in original.items()
        }
    )


def changed_entries(weights: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Of all entries of each tensor, flat, those that the mask selects; without tensors of which it selects none."""
    return {
        name: values[mask.dense(name).view(-1).to(values.device)]
        for name, values in weights.items()
        if mask.bits[name].any()
    }


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
