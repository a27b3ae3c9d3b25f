"""`salun eval`: metrics of a finished run on more images, from its folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from salun.config import read_record
from salun.delta.delta import Delta
from salun.diffusion.evaluation import compare, eval_prompts, evaluate_model
from salun.diffusion.model.loading import load_with
from salun.diffusion.options import EraseJob
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept
from salun.errors import DataError
from salun.files import write_bytes
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache
from salun.runs.reading import read_run


def evaluate_run(
    folder: Path, n: int, seed: int, device: str = "auto", progress: Progress = silent, allow_pickle: bool = False
) -> dict[str, Any]:
    """The metrics of `compare` over n forget images for each concept and n retain images, also written to `eval.json`.

    Args:
        folder: Holds `run.json` and a delta, both untrusted input.
        allow_pickle: Whether the run's model may be a pickle, whatever the record says.

    Raises:
        DataError: There is no finished run or no delta.
        ConfigError: The record holds invalid options.
        ModelError: The model is not the run's.
    """
    record = read_finished(folder)
    delta = file_of(record, folder, "delta")
    if delta is None:
        raise DataError(
            f"{folder} holds no delta",
            advice="run the erasure again without {output}, or with one that ends in .salun.safetensors",
        )
    job = EraseJob(**read_record(record, folder / "run.json"))
    options = replace(job.options, device=device, allow_pickle=allow_pickle)
    model = load_with(str(job.model), options)
    plan = make_plan(model.settings, model.name, [Concept(name) for name in job.concept], options)
    prompts = eval_prompts(plan, n, seed)
    with model.configured(plan.options):
        before = evaluate_model(model, prompts, progress, Stage.IMAGES_BEFORE, Cache.of_user())
        model.load(Delta.load(delta).apply(model.original()))
        after = evaluate_model(model, prompts, progress, Stage.IMAGES_AFTER)
        model.load(model.original())
        metrics = compare(model, plan, prompts, before, after, progress)
    text = json.dumps({"n": n, "seed": seed, **metrics}, indent=1) + "\n"
    write_bytes(folder / "eval.json", text.encode("utf-8"))
    return metrics


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a finished erasure, which may be untrusted input. Raises DataError if the folder holds none."""
    record = read_run(folder)
    options, mask = record["options"], record["mask"]
    if "model" not in options or "concept" not in options:
        raise DataError(f"the run in {folder} is not an erasure (its command: {record['command'][:80]!r})")
    if record["status"] != "done":
        raise DataError(f"the run in {folder} is {record['status']}, not done, so it has no result yet")
    types = {"mode": str, "selected": int, "total": int}
    if mask is None or any(type(mask.get(name)) is not kind for name, kind in types.items()):
        raise DataError(f"{folder / 'run.json'} has no valid mask entry", advice="run the erasure again")
    return record


def file_of(record: Mapping[str, Any], folder: Path, kind: str) -> Path | None:
    """The first output of a kind inside the run folder, links followed; files outside are never read."""
    root = Path(os.path.realpath(folder))
    for entry in record["outputs"]:
        path = Path(os.path.realpath(folder / entry["path"]))
        if entry["kind"] == kind and root in path.parents and path.is_file():
            return path
    return None
