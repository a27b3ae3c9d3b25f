"""Where a run will write: paths that must not meet, and the disk space it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from salun.checkpoints.outputs import DELTA, DIFF, LORA
from salun.checkpoints.patch import size_of
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import Plan
from salun.errors import ConfigError
from salun.masking.mask import entries
from salun.options import EraseOptions

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


STATE_BYTES = 12  # a salient entry's float32 master and Adam's two moments


def other_input_paths(options: EraseOptions) -> list[str | None]:
    """What a run reads beside the model, and no output may replace."""
    return [options.components, options.mask, options.forget_images, options.retain_images]


def check_output_paths(model: Model, targets: list[str], run_dir: Path | None, read: Sequence[str | None] = ()) -> None:
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
    total = sum(p.numel() for p in parameters_in_scope(model, plan.options.scope).values())
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
