"""`salun train`: a class-conditional diffusion model from scratch."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from salun.diffusion.train_options import GROUPS, ClassTrainOptions

from .app import app
from .options import with_options
from .output import Json, print_result, unquoted_path
from .progress import terminal_progress
from .resuming import note_new_run, recorded, resumable, unfinished


@app.command()
@with_options(ClassTrainOptions, groups=GROUPS)
def train(
    options: ClassTrainOptions,
    given: set[str],
    run_dir: Annotated[
        Path | None,
        typer.Option(callback=unquoted_path, help="Folder of the run (default: runs/<time>-train-<data>)"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the unfinished run in --run-dir, or start one if there is none")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a class-conditional diffusion model on labeled images, to erase classes from; or without a class."""
    wanted = {name: getattr(options, name) for name in given}
    record = unfinished(run_dir, resume, ClassTrainOptions, wanted, as_json)
    if record is not None and run_dir is not None:
        options = dataclasses.replace(options, **recorded(record, run_dir, ClassTrainOptions, given))
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

    model = (done.folder or path).absolute()
    lines = [
        *done.record.notes,
        f"model: {model}",
        f"samples: {path.absolute() / 'samples.png'}",
        *(
            f"{name.replace('_', ' ')}: {from_json(of).text(unit)}"
            for name, of in done.record.metrics.items()
            for unit in ["" if name == "frechet" else "%"]
        ),
        f"Try it: salun erase --model {shlex.quote(str(model))} --concept class:0",
    ]
    print_result(done.record.as_json(), as_json, lines)
