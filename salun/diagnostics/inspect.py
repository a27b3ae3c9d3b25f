"""`salun inspect`: what a file or folder is, and which layers it affects."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.hashing import base_hash
from salun.checkpoints.lazy_tensors import LazyTensors
from salun.checkpoints.outputs import DELTA
from salun.checkpoints.single_file import is_bare_network
from salun.delta import delta as deltas
from salun.diffusion.model.loading import ModelSpec, describe
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.options import ModelOptions
from salun.errors import ConfigError, ModelError
from salun.masking.mask import FORMAT as MASK_FORMAT
from salun.masking.mask import Mask
from salun.report.density import per_block
from salun.runs.reading import file_of, read_finished, read_run
from salun.user_text import checked

COUNTED = ("kind", "selected", "total", "density")  # of a mask, whatever its metadata say


def inspect(path: str, options: ModelOptions | None = None) -> dict[str, Any]:
    """Kind and contents of a model, mask, delta or run folder. Raises ModelError for anything else.

    Masks, deltas and finished erasures also have `blocks` and `layers`: block or parameter of the UNet → [entries
    selected or changed, entries in all]. Runs have their `metrics`, which may be untrusted input.
    """
    place = Path(path).expanduser()
    if path.endswith(DELTA) and not place.exists():
        raise ModelError(f"{path} does not exist")
    if os.path.lexists(place / "run.json"):
        return _run(place)
    if place.is_file() and place.suffix.lower() == ".safetensors":
        special = _salun_format(place)
        if special is not None:
            return special
    return _model(describe(path, options))


def _run(folder: Path) -> dict[str, Any]:
    """A run: what it was, its metrics, and what a finished erasure changed."""
    record = read_run(folder)
    options = record["options"]
    facts = {"kind": "run", **{key: record[key] for key in ("status", "command", "seed")}}
    if "concept" in options:
        facts |= {"model": options.get("model"), "concept": ", ".join(options["concept"])}
    if record["status"] != "done" or "concept" not in options or record["mask"] is None:
        error = record["error"] if record["status"] == "failed" else None
        return {**facts, "error": error, "metrics": record["metrics"]}
    record = read_finished(folder)
    delta = file_of(record, folder, "delta")
    return {
        **facts,
        "mask": f"{record['mask']['mode']}, {record['mask']['selected']:,} of {record['mask']['total']:,}",
        "metrics": record["metrics"],
        **_per_layer(_layers_of_mask(Mask.load(folder / "mask.safetensors"))),
        "moved": _delta(delta)["blocks"] if delta is not None else None,
    }


def _model(spec: ModelSpec) -> dict[str, Any]:
    entries = [spec.stored.entry(name) for name in spec.stored]
    not_finite: list[str] = []

    def read(name: str) -> Tensor:
        tensor = spec.stored[name]
        if not not_finite and not torch.isfinite(tensor.float()).all():
            not_finite.append(spec.stored.name_in_file(name))
        return tensor

    facts: dict[str, Any] = {
        "kind": "single file" if spec.contents else "diffusers folder",
        "path": str(spec.stored.path),
        "family": spec.family.name,
        "prediction_type": spec.scheduler_config.get("prediction_type", "epsilon"),
        "prediction_from": spec.prediction_from,
        "resolution": spec.settings.sampling.resolution,
        "unet_parameters": sum(prod(entry.shape) for entry in entries),
        "unet_dtypes": ", ".join(f"{dtype} × {n}" for dtype, n in sorted(Counter(e.dtype for e in entries).items())),
        "base_hash": base_hash(LazyTensors(spec.stored, read)),
        "detector": spec.settings.detector.name if spec.settings.detector else None,
        "vocabulary": sorted(spec.settings.vocabulary.attributes) if spec.settings.vocabulary else None,
    }
    if spec.settings.few_steps is not None:
        facts["few_steps"] = spec.settings.few_steps.text
    if spec.contents is not None:
        contents = spec.contents
        missing = "from components" if spec.folder else "missing: components gives a folder or hub id that has one"
        facts["vae"] = "yes" if contents.has_vae else missing
        facts["text_encoders"] = ", ".join("yes" if there else missing for there in contents.text)
        facts["ema"] = f"{len(contents.ema)} tensors, a second copy of the weights" if contents.ema else "none"
        facts["other_tensors"] = len(contents.others)
        facts |= {name: text for name, text in contents.header.metadata.items() if name.startswith("salun.")}
    facts["verdict"] = _verdict(spec, not_finite)
    return facts


def _verdict(spec: ModelSpec, not_finite: list[str]) -> str:
    """Whether salun can erase from a model, by its names, shapes and UNet values, or what prevents it."""
    from salun.diffusion.model.loading import check_folder
    from salun.diffusion.model.single_file import check_parts

    lacking: list[str] = []
    try:
        checked(spec.name, "model")
        if not_finite:
            raise ModelError(f"{spec.stored.path}: {not_finite[0]} is not finite (NaN or infinity)")
        schedule_of(spec.scheduler_config, spec.name)
        if spec.contents is None:
            check_folder(spec)
        else:
            lacking = check_parts(spec.contents, spec.folder, spec.scheduler_config["prediction_type"])
    except (ConfigError, ModelError) as error:
        return str(error)
    return "salun can erase from it" + (" with components that give what is missing" if lacking else "")


def _salun_format(place: Path) -> dict[str, Any] | None:
    """A mask, a delta or a UNet's weights alone; None for anything else."""
    header = safetensors_io.read_header(place)
    kind = header.metadata.get("format")
    if kind == MASK_FORMAT:
        mask = Mask.load(place)
        return {
            "kind": "mask",
            **{name: text for name, text in mask.metadata.items() if name not in COUNTED},
            "selected": mask.selected,
            "total": mask.total,
            "density": mask.density,  # as counted; the metadata have the requested density
            **_per_layer(_layers_of_mask(mask)),
        }
    if kind == deltas.FORMAT:
        return _delta(place)
    if is_bare_network(header):
        return {"kind": "UNet weights (diffusers names)", "tensors": len(header.names), **header.metadata}
    return None


def overlap(first_file: str, second_file: str) -> dict[str, Any]:
    """How far two masks of one model (files, or run folders that hold them) agree.

    jaccard: |A ∩ B| / |A ∪ B|, in all and per block. by_chance: what two masks of these densities, drawn at random,
    would have. Raises MaskError if they are of different models.
    """
    first, second = (_mask_in(Path(path)) for path in (first_file, second_file))
    both, either = first & second, first | second
    a, b = first.density, second.density
    counts = {name: (n, either.counts()[name]) for name, n in both.counts().items()}
    return {
        "kind": "overlap",
        "jaccard": first.jaccard(second),
        "by_chance": a * b / (a + b - a * b) if a or b else 1.0,
        "in_both": both.selected,
        "in_either": either.selected,
        **_per_layer(counts),
    }


def _mask_in(place: Path) -> Mask:
    return Mask.load(place / "mask.safetensors" if place.is_dir() else place)


def _delta(place: Path) -> dict[str, Any]:
    delta = deltas.Delta.load(place)
    layers = {name: (change.count, prod(change.shape)) for name, change in delta.changes.items()}
    return {
        "kind": "delta",
        **{name: text for name, text in delta.metadata.items() if name != "kind"},
        "id": delta.id,
        "changed": delta.changed,
        "tensors": len(delta.names),
        "base_hash": delta.base_hash,
        "result_hash": delta.result_hash,
        **_per_layer(layers),
    }


def _layers_of_mask(mask: Mask) -> dict[str, tuple[int, int]]:
    return {name: (count, prod(mask.shapes[name])) for name, count in mask.counts().items()}


def _per_layer(layers: dict[str, tuple[int, int]]) -> dict[str, dict[str, list[int]]]:
    return {
        "blocks": {block: list(row) for block, row in per_block(layers).items()},
        "layers": {name: list(row) for name, row in layers.items()},
    }
