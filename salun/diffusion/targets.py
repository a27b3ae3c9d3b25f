"""Where a run will write: paths that must not collide, and the disk space it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

from salun.checkpoints.outputs import DELTA, DIFF, LORA
from salun.checkpoints.patch import size_of
from salun.checkpoints.single_file import shapes_of
from salun.diffusion.model.loading import ModelSpec
from salun.diffusion.model.scopes import in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan
from salun.errors import ConfigError
from salun.masking.mask import entries

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


STATE_BYTES = 12  # of each trained weight: its float32 master and Adam's two moments


def other_input_paths(options: EraseOptions) -> list[str | None]:
    """Inputs of a run other than the model, which no output may replace."""
    return [options.components, options.mask, options.forget_images, options.retain_images]


def check_output_paths(
    model: Model | ModelSpec, targets: list[str], run_dir: Path | None, read: Sequence[str | None] = ()
) -> None:
    """Raises ConfigError for paths that an erasure must not change or replace.

    That is an output or run folder inside the model's own folder, an output that holds the model, the run or another
    input, two outputs at one path, an output under a name that is reserved in the run folder, and one in a format that
    the family does not have.

    Args:
        read: Files and folders that the run reads besides the model.
    """
    foreign = [t for t in targets if not model.family.text and not t.endswith(("/", os.sep, DELTA))]
    if foreign:
        raise ConfigError(
            f"is {foreign[0]}, but class-conditional models are diffusers folders",
            option="output",
            advice=f"End it in / (diffusers folder) or {DELTA} (delta)",
        )
    source = _real(model.stored.path)
    run = _real(run_dir) if run_dir is not None else None
    paths = {target: _real(target) for target in targets}
    checked = [("output", target, path) for target, path in paths.items()]
    for option, target, path in [*checked, *([("run_dir", str(run_dir), run)] if run is not None else [])]:
        if source in (path, *path.parents):
            what = "is the model's own file" if model.stored.single else "is inside the model's own folder"
            raise _elsewhere(f"{target} {what}", option)
    inputs = [Path(name).expanduser() for name in read if name]
    held = [("the model itself", source), ("the run folder", run)]
    held += [(f"{path}, which is an input", _real(path)) for path in inputs if path.exists()]
    for target, path in paths.items():
        if path.is_file() and any(os.path.samefile(path, file) for file in model.stored.files):
            raise _elsewhere(f"{target} is the model's own file")
        for what, inner in held:
            if inner is not None and path in (inner, *inner.parents):
                raise _elsewhere(f"{target} holds {what}")
        if len([other for other in paths.values() if other in (path, *path.parents)]) > 1:
            raise ConfigError(
                f"{target} is at or inside another output", option="output", advice="Write them next to each other"
            )
        if run is not None and run in path.parents and path.relative_to(run).parts[0] in RUN_FILES:
            raise ConfigError(
                f"{target} has a name that is reserved in the run folder", option="output", advice="Choose another name"
            )


def _elsewhere(message: str, option: str = "output") -> ConfigError:
    return ConfigError(message, option=option, advice="Write somewhere else")


def _real(path: Path | str) -> Path:
    """Without links, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


def trained_entries(total: int, plan: Plan) -> int:
    """How many of the weights in scope training may change."""
    masked = plan.method.takes_mask and plan.options.mask != "full"
    return entries(total, plan.options.density) if masked else total


def disk_needed(model: Model | ModelSpec, plan: Plan, outputs: list[str], run_dir: Path | None) -> dict[Path, int]:
    """Path → bytes that a run needs there at most.

    Each output at its own path; those of the run folder with mask and training state, which needs its room twice, as
    it is rewritten atomically.
    """
    network = sum(entry.end - entry.start for entry in map(model.stored.entry, model.stored))
    checkpoint = size_of(model.stored)
    total = sum(prod(shape) for shape in in_scope(model.family, shapes_of(model.stored), plan.scope).values())
    delta = total // 8 + network  # at most: a bit for each entry and every changed one
    difference = 4 * total  # bytes: two for each entry of a full difference; twice that for a LoRA of full rank
    needed = {
        Path(name): delta if name.endswith(DELTA) else difference if name.endswith((LORA, DIFF)) else checkpoint
        for name in outputs
    }
    if run_dir is not None:
        earlier = 4 if plan.goal is not None else 0  # float32 weights that it may come back to
        state = total // 8 + 2 * (STATE_BYTES + earlier) * trained_entries(total, plan)
        needed[run_dir] = state + (0 if outputs else checkpoint + delta)
    return needed
