"""`salun eval`: a thorough, fresh look at a finished run, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from salun.cache import Cache
from salun.diffusion.concepts import Concept
from salun.diffusion.loading import load_with
from salun.diffusion.observe import compare, observe, questions
from salun.diffusion.plan import make_plan
from salun.errors import DataError
from salun.formats.delta import Delta
from salun.formats.tensorfile import write_bytes
from salun.options import EraseOptions, from_mapping
from salun.progress import Progress, silent


def evaluate_run(folder: Path, n: int, seed: int, device: str = "auto", progress: Progress = silent) -> dict[str, Any]:
    """The metrics of `compare` over n forget pictures a concept and n retain pictures, also written to `eval.json`.

    The folder must hold `run.json` and a delta. Raises DataError if it does not, ModelError if the model is another.
    """
    record = read_run(folder)
    named = [entry["path"] for entry in record["outputs"] if entry["kind"] == "delta"]
    candidates = [folder / name for name in named if (folder / name).is_file()]
    if not candidates:
        raise DataError(
            f"{folder} holds no delta: run `salun erase` without --output, or with one in .salun.safetensors"
        )
    options = dict(record["options"])
    name, concepts = str(options.pop("model")), [Concept(str(name)) for name in options.pop("concept")]
    options.pop("output", None)
    asked_for = from_mapping(EraseOptions, {**options, "device": device}, str(folder))
    model = load_with(name, asked_for)
    plan = make_plan(model.settings, model.name, concepts, asked_for)
    asked = questions(plan, n, seed)
    with model.set_up(plan.options):
        before = observe(model, asked, progress, "pictures before", Cache.of_user())
        model.load(Delta.load(candidates[0]).apply(model.original()))
        after = observe(model, asked, progress, "pictures after")
        metrics = compare(model, plan, asked, before, after)
    text = json.dumps({"n": n, "seed": seed, **metrics}, indent=1) + "\n"
    write_bytes(folder / "eval.json", text.encode("utf-8"))
    return metrics


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a finished run. Raises DataError if there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if record["schema"] != 1 or not isinstance(record["options"]["model"], str):
            raise KeyError("schema")
        if not isinstance(record["outputs"], list) or not isinstance(record["status"], str):
            raise KeyError("outputs")
        if record["status"] == "done" and not {"mode", "selected", "total"} <= set(record["mask"]):
            raise KeyError("mask")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no run folder of salun erase (its run.json cannot be read: {error!r})") from error
    if record["status"] != "done":
        raise DataError(f"the run in {folder} is {record['status']}, not done: there is nothing to judge yet")
    return record
