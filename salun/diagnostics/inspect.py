"""`salun inspect`: what is this file or folder, and which layers does it touch?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.hashing import base_hash
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.outputs import DELTA
from salun.checkpoints.single_file import other_kind
from salun.delta import delta as deltas
from salun.diffusion.model.loading import Description, describe
from salun.diffusion.model.schedule import check_schedule
from salun.diffusion.reevaluate import file_of, read_finished
from salun.errors import ConfigError, ModelError
from salun.masking.mask import FORMAT as MASK_FORMAT
from salun.masking.mask import Mask
from salun.options import ModelOptions
from salun.report import charts
from salun.user_text import checked


def inspect(path: str, options: ModelOptions | None = None) -> dict[str, Any]:
    """Kind and contents of a model, mask, delta or run folder. Raises ModelError for anything else.

    Masks, deltas and runs tell `blocks` and `layers` too: block or parameter of the UNet → [entries selected or
    changed, entries in all].
    """
    place = Path(path).expanduser()
    if path.endswith(DELTA) and not place.exists():
        raise ModelError(f"there is no delta {path}")
    if os.path.lexists(place / "run.json"):
        record = read_finished(place)
        delta = file_of(record, place, "delta")
        moved = _delta(delta)["blocks"] if delta is not None else None
        return {
            "kind": "run",
            **{key: record[key] for key in ("status", "command", "seed")},
            "model": record["options"]["model"],
            "concept": ", ".join(record["options"]["concept"]),
            "mask": f"{record['mask']['mode']}, {record['mask']['selected']:,} of {record['mask']['total']:,}",
            **_shares(_layers_of_mask(Mask.load(place / "mask.safetensors"))),
            "moved": moved,
        }
    if place.is_file() and place.suffix.lower() == ".safetensors":
        special = _ours(place)
        if special is not None:
            return special
    return _model(describe(path, options))


def _model(found: Description) -> dict[str, Any]:
    entries = [found.stored.entry(name) for name in found.stored]
    looked = _Looked(found.stored)
    facts: dict[str, Any] = {
        "kind": "single file" if found.contents else "diffusers folder",
        "path": str(found.stored.path),
        "family": found.family,
        "prediction_type": found.scheduler_config.get("prediction_type", "epsilon"),
        "prediction_from": found.prediction_from,
        "resolution": found.settings.sampling.resolution,
        "unet_parameters": sum(prod(entry.shape) for entry in entries),
        "unet_dtypes": ", ".join(f"{dtype} × {n}" for dtype, n in sorted(Counter(e.dtype for e in entries).items())),
        "base_hash": base_hash(looked),
        "detector": found.settings.detector.name if found.settings.detector else None,
        "vocabulary": sorted(found.settings.vocabulary.attributes) if found.settings.vocabulary else None,
    }
    if found.settings.few_steps is not None:
        facts["few_steps"] = found.settings.few_steps.text
    if found.contents is not None:
        contents = found.contents
        missing = "from --components" if found.folder else "missing: --components names a folder or hub id that has one"
        facts["vae"] = "yes" if contents.has_vae else missing
        facts["text_encoders"] = ", ".join("yes" if there else missing for there in contents.text)
        facts["ema"] = f"{len(contents.ema)} tensors, a second copy of the weights" if contents.ema else "none"
        facts["other_tensors"] = len(contents.others)
        facts |= {name: text for name, text in contents.header.metadata.items() if name.startswith("salun.")}
    facts["verdict"] = _verdict(found, looked.not_finite)
    return facts


class _Looked(Mapping[str, Tensor]):
    """A UNet's tensors, which remembers the first that holds NaN or infinity."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self.not_finite: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if self.not_finite is None and not torch.isfinite(tensor.float()).all():
            self.not_finite = self._stored.inner(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _verdict(found: Description, not_finite: str | None) -> str:
    """Whether it can be erased from, as far as names, shapes and the UNet's values tell, or what is in the way."""
    from salun.diffusion.model.loading import check_folder
    from salun.diffusion.model.single_file import check_parts

    lacking: list[str] = []
    try:
        checked(found.name, "model")
        if not_finite is not None:
            raise ModelError(f"{found.stored.path}: {not_finite} holds NaN or infinity: it is damaged")
        check_schedule(found.scheduler_config, found.name)
        if found.contents is None:
            check_folder(found)
        else:
            lacking = check_parts(found.contents, found.folder, found.scheduler_config["prediction_type"])
    except (ConfigError, ModelError) as error:
        return str(error)
    return "salun can erase from it" + (" with --components, which gives what is missing" if lacking else "")


def _ours(place: Path) -> dict[str, Any] | None:
    """A mask, a delta or a UNet's weights alone; None for anything else."""
    header = safetensors_io.read_header(place)
    kind = header.metadata.get("format")
    if kind == MASK_FORMAT:
        mask = Mask.load(place)
        return {
            **mask.metadata,
            "kind": "mask",
            "selected": mask.selected,
            "total": mask.total,
            "density": mask.density,  # as counted; the metadata's is the one asked for
            **_shares(_layers_of_mask(mask)),
        }
    if kind == deltas.FORMAT:
        return _delta(place)
    if any(name.startswith("down_blocks.") for name in header.names) and "a UNet alone" in (other_kind(header) or ""):
        return {"kind": "UNet weights (diffusers names)", "tensors": len(header.names), **header.metadata}
    return None


def overlap(one: str, other: str) -> dict[str, Any]:
    """How far two masks of one model (files, or run folders that hold them) agree.

    jaccard: |A ∩ B| / |A ∪ B|, in all and per block. by_chance: what two masks of these densities, drawn at random,
    would have. Raises MaskError if they are not of one model.
    """
    first, second = (_mask_in(Path(path)) for path in (one, other))
    both, either = first & second, first | second
    a, b = first.density, second.density
    counts = {name: (n, either.counts()[name]) for name, n in both.counts().items()}
    return {
        "kind": "overlap",
        "jaccard": first.jaccard(second),
        "by_chance": a * b / (a + b - a * b) if a or b else 1.0,
        "in_both": both.selected,
        "in_either": either.selected,
        **_shares(counts),
    }


def _mask_in(place: Path) -> Mask:
    return Mask.load(place / "mask.safetensors" if place.is_dir() else place)


def _delta(place: Path) -> dict[str, Any]:
    delta = deltas.Delta.load(place)
    layers = {name: (change.count, prod(change.shape)) for name, change in delta.changes.items()}
    return {
        **delta.metadata,
        "kind": "delta",
        "id": delta.id,
        "changed": delta.changed,
        "tensors": len(delta.names),
        "base_hash": delta.base_hash,
        "result_hash": delta.result_hash,
        **_shares(layers),
    }


def _layers_of_mask(mask: Mask) -> dict[str, tuple[int, int]]:
    return {name: (count, prod(mask.shapes[name])) for name, count in mask.counts().items()}


def _shares(layers: dict[str, tuple[int, int]]) -> dict[str, dict[str, list[int]]]:
    return {
        "blocks": {block: list(row) for block, row in charts.per_block(layers).items()},
        "layers": {name: list(row) for name, row in layers.items()},
    }
