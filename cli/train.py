"""`salun train`: a class-conditional diffusion model from scratch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.train_options import GROUPS, ClassTrainOptions

from .app import app
from .options import with_options
from .output import Json, duration, print_result, unquoted_path
from .progress import terminal_progress
from .resuming import Config, note_new_run, resumable, with_config


@app.command()
@with_options(ClassTrainOptions, groups=GROUPS)
def train(
    options: ClassTrainOptions,
    given: set[str],
    run_dir: Annotated[
        Path | None,
        typer.Option(callback=unquoted_path, help="Folder of the run (default: runs/<time>-train-<data>)"),
    ] = None,
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the unfinished run in --run-dir, or start one if there is none")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and the estimated time; write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a class-conditional diffusion model on labeled images, to erase classes from; or without a class."""
    options = with_config(options, given, config, resume, run_dir, as_json)
    if dry_run:
        from salun.diffusion.train_estimate import preview_training

        with terminal_progress(as_json) as progress:
            planned = preview_training(options, progress)
        print_result(planned, as_json, _preview_lines(planned))
        return
    from salun.compute.processes import current_processes
    from salun.diffusion.train import train_class_model
    from salun.runs.folder import new_run_folder

    who = current_processes()
    name = "-".join(["train", Path(options.data).name, *(f"no-{each}" for each in options.without)])
    path = who.broadcast(run_dir or new_run_folder(name))
    line = shlex.join(["salun", *sys.argv[1:]])
    note_new_run(path, resume, as_json or who.rank > 0)
    with terminal_progress(as_json or who.rank > 0, path) as progress, resumable("train", path):
        done = train_class_model(options, path, resume, progress, line)
    if who.rank:
        return
    from salun.evaluation.estimate import from_json

    model, vocabulary = (done.folder or path).absolute(), done.model.settings.vocabulary
    assert vocabulary is not None
    left_out = {vocabulary.value_of(each) for each in done.record.options["without"]}
    concept = next(label for label in done.model.labels if label not in left_out)
    lines = [
        *done.record.notes,
        f"model: {model}",
        f"samples: {path.absolute() / 'samples.png'}",
        *(
            f"{name.replace('_', ' ')}: {from_json(of).text(unit)}"
            for name, of in done.record.metrics.items()
            for unit in ["" if name == "frechet" else "%"]
        ),
        f"Try it: salun erase --model {shlex.quote(str(model))} --concept {shlex.quote(f'class:{concept}')}",
    ]
    print_result(done.record.as_json(), as_json, lines)


def _preview_lines(planned: Mapping[str, Any]) -> list[str]:
    """What a dry run found."""
    options, (channels, height, width) = planned["options"], planned["shape"]
    without = f", without {', '.join(planned['left_out'])}" if planned["left_out"] else ""
    return [
        *planned["notes"],
        f"data: {options['data']}, {len(planned['classes'])} classes{without}; {planned['images']:,} images of "
        f"{width}×{height} in {channels} channel{'s' * (channels != 1)}",
        f"network: {planned['parameters']:,} weights, on {planned['device']}",
        f"training: {options['steps']:,} steps of {options['batch_size']:,} images, lr {options['lr']:g}",
        f"time: about {duration(planned['seconds'])}",
    ]
