"""`salun eval`: a thorough, fresh look at a finished run, from its folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from salun.config import read_record
from salun.delta.delta import Delta
from salun.diffusion.evaluation import compare, observe, questions
from salun.diffusion.model.loading import load_with
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept
from salun.errors import DataError
from salun.files import write_bytes
from salun.options import EraseJob
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache
from salun.runs.reading import read_run


def evaluate_run(
    folder: Path, n: int, seed: int, device: str = "auto", progress: Progress = silent, allow_pickle: bool = False
) -> dict[str, Any]:
    """The metrics of `compare` over n forget pictures a concept and n retain pictures, also written to `eval.json`.

    The folder must hold `run.json` and a delta, both untrusted input. allow_pickle: of the model, whatever the record
    says. Raises DataError if there is none, ConfigError for options in it that are not valid, ModelError if the model
    is another.
    """
    record = read_finished(folder)
    delta = file_of(record, folder, "delta")
    if delta is None:
        raise DataError(
            f"{folder} holds no delta: run `salun erase` without --output, or with one in .salun.safetensors"
        )
    job = EraseJob(**read_record(record, folder / "run.json"))
    asked_for = replace(job.options, device=device, allow_pickle=allow_pickle)
    model = load_with(str(job.model), asked_for)
    plan = make_plan(model.settings, model.name, [Concept(name) for name in job.concept], asked_for)
    asked = questions(plan, n, seed)
    with model.set_up(plan.options):
        before = observe(model, asked, progress, Stage.IMAGES_BEFORE, Cache.of_user())
        model.load(Delta.load(delta).apply(model.original()))
        after = observe(model, asked, progress, Stage.IMAGES_AFTER)
        metrics = compare(model, plan, asked, before, after)
    text = json.dumps({"n": n, "seed": seed, **metrics}, indent=1) + "\n"
    write_bytes(folder / "eval.json", text.encode("utf-8"))
    return metrics


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a finished erasure, which may be untrusted input. Raises DataError if the folder holds none."""
    record = read_run(folder)
    options, mask = record["options"], record["mask"]
    if "model" not in options or "concept" not in options:
        raise DataError(f"the run in {folder} is no erasure (its command: {record['command'][:80]!r})")
    if record["status"] != "done":
        raise DataError(f"the run in {folder} is {record['status']}, not done: there is nothing to judge yet")
    wanted = {"mode": str, "selected": int, "total": int}
    if mask is None or any(type(mask.get(name)) is not kind for name, kind in wanted.items()):
        raise DataError(f"{folder / 'run.json'} says nothing valid of its mask: run the erasure again")
    return record


def file_of(record: Mapping[str, Any], folder: Path, kind: str) -> Path | None:
    """The first output of a kind that lies in the run folder; a record names none outside that is read."""
    root = Path(os.path.realpath(folder))
    for entry in record["outputs"]:
        place = Path(os.path.realpath(folder / entry["path"]))
        if entry["kind"] == kind and root in place.parents and place.is_file():
            return place
    return None
