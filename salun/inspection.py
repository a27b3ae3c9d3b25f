"""`salun inspect`: what is this file or folder?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salun.diffusion.evaluate import read_run
from salun.diffusion.models import describe
from salun.errors import ModelError
from salun.formats import delta as deltas
from salun.formats import tensorfile
from salun.formats.hashing import base_hash
from salun.mask import FORMAT as MASK_FORMAT
from salun.mask import Mask


def inspect(path: str) -> dict[str, Any]:
    """Kind and contents of a model, mask, delta or run folder. Raises ModelError for anything else."""
    place = Path(path)
    if (place / "run.json").is_file():
        record = read_run(place)
        return {
            "kind": "run",
            **{key: record[key] for key in ("status", "command", "seed")},
            "model": record["options"]["model"],
            "concept": ", ".join(record["options"]["concept"]),
            "mask": f"{record['mask']['mode']}, {record['mask']['selected']:,} of {record['mask']['total']:,}",
        }
    if place.is_file():
        return _file(place)
    found = describe(path)
    tensors = {name: entry for file in found.unet_files for name, entry in tensorfile.read_header(file).entries.items()}
    lazy = {name: tensor for file in found.unet_files for name, tensor in tensorfile.tensors(file)}
    return {
        "kind": "model",
        "pipeline": found.pipeline,
        "family": found.family,
        "prediction_type": found.scheduler_config.get("prediction_type", "epsilon"),
        "unet_parameters": sum(t.numel() for t in lazy.values()),
        "unet_dtypes": ", ".join(sorted({entry.dtype for entry in tensors.values()})),
        "base_hash": base_hash(lazy),
        "detector": found.settings.detector.name if found.settings.detector else None,
        "vocabulary": sorted(found.settings.vocabulary.attributes) if found.settings.vocabulary else None,
    }


def _file(place: Path) -> dict[str, Any]:
    header = tensorfile.read_header(place)
    kind = header.metadata.get("format")
    if kind == MASK_FORMAT:
        mask = Mask.load(place)
        return {
            **mask.metadata,
            "kind": "mask",
            "selected": mask.selected,
            "total": mask.total,
            "density": mask.density,  # as counted; the metadata's is the one asked for
        }
    if kind == deltas.FORMAT:
        delta = deltas.Delta.load(place)
        return {
            **delta.metadata,
            "kind": "delta",
            "changed": delta.changed,
            "tensors": len(delta.names),
            "base_hash": delta.base_hash,
            "result_hash": delta.result_hash,
        }
    if any(name.startswith("down_blocks.") for name in header.names):
        return {"kind": "UNet weights (diffusers names)", "tensors": len(header.names), **header.metadata}
    raise ModelError(
        f"{place} is a safetensors file, but no mask, delta or diffusers UNet of {len(header.names)} tensors"
    )
