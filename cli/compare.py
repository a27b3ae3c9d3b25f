"""`salun compare`: unlearning methods side by side."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.compare_options import GROUPS, NOT_COMPARED, CompareOptions

from .app import app
from .options import with_options
from .output import Json, default_model_named, duration_range, print_result, sentences
from .progress import terminal_progress
from .resuming import note_new_run, recorded, resumable, unfinished


@app.command()
@with_options(CompareOptions, skip=NOT_COMPARED, groups=GROUPS)
def compare(
    options: CompareOptions,
    given: set[str],
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the comparison in --run-dir, with the erasures that failed")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the erasures and their estimated time; write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare unlearning methods: each erases each concept with each seed, on equal terms; one table."""
    from salun.runs.folder import check_folder, new_run_folder

    folder = Path(options.run_dir) if options.run_dir else None
    wanted = {name: getattr(options, name) for name in given}
    record = unfinished(folder, resume, CompareOptions, wanted, as_json)
    if record is not None and folder is not None:
        options = dataclasses.replace(options, **recorded(record, folder, CompareOptions, given))
    folder = folder or new_run_folder("compare")
    check_folder(folder, resume)
    if dry_run:
        from salun.diffusion.compare_estimate import preview_comparison

        with terminal_progress(as_json) as progress, default_model_named(options.model):
            planned = preview_comparison(options, folder, progress=progress)
        print_result(planned, as_json, _planned_lines(planned))
        return
    note_new_run(folder, resume, as_json)
    from salun.diffusion.compare import compare as run_compare

    with (
        terminal_progress(as_json, folder) as progress,
        default_model_named(options.model),
        resumable("compare", folder, ["--allow-pickle"] * options.allow_pickle),
    ):
        command = shlex.join(["salun", *sys.argv[1:]])
        comparison = run_compare(options, progress=progress, run_dir=folder, resume=resume, command=command)
    print_result(
        comparison.record.as_json(),
        as_json,
        [
            *_lines(comparison.table),
            *sentences([f"note: {note}" for note in comparison.record.notes]),
            f"report: {folder.absolute() / 'report.html'}",
        ],
    )


def _planned_lines(planned: dict[str, Any]) -> list[str]:
    """What a dry run found: each erasure that is left, and the time of all."""
    left = [job for job in planned["jobs"] if not job["done"]]
    lines = [f"model:  {planned['model']}", f"folder: {planned['run_dir']}"]
    for job in left:
        time = duration_range(job["least"], job["most"])
        steps = f"{job['steps']} steps" if job["steps"] else "in closed form"
        lines.append(f"        {job['method']}, {job['concept']}, seed {job['seed']}: {steps}, {time}")
    for search in planned["searches"]:
        if search["most"]:
            time = duration_range(search["least"], search["most"])
            lines.append(f"        search of {search['option']} for {search['name']}: {time}")
    done = len(planned["jobs"]) - len(left)
    also = f" ({done} of {len(planned['jobs'])} are done)" if done else ""
    total = duration_range(planned["least"], planned["most"])
    lines += sentences([f"note:   {note}" for note in planned["notes"]])
    return [*lines, f"time:   {total} on {planned['device']}{also}"]


def _lines(table: dict[str, Any]) -> list[str]:
    """The table in columns, without standard deviations."""
    from salun.diffusion.compare_table import COLUMNS, best_attack, ranked, title_in

    names = ("score", "ua", "ra", "neighbors", "asr", "image_drift", "seconds", "passes", "delta_mb")
    columns = [column for column in COLUMNS if column.name in names]
    rows = [["", *(title_in(table, column) for column in columns)]]
    for row in ranked(table):
        values = [(row[column.name], column) for column in columns]
        shown = [f"{of['mean']:,.{column.digits}f}{best_attack(row, column)}" if of else "–" for of, column in values]
        rows.append([row["title"], *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
