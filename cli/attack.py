"""`salun attack`: does an erased concept come back?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.attack_options import GROUPS, AttackOptions

from .app import app
from .options import with_options
from .output import Json, duration_range, flag, print_result, unquoted_path
from .progress import terminal_progress
from .resuming import repeatable


@app.command()
@with_options(AttackOptions, groups=GROUPS)
def attack(
    options: AttackOptions,
    target: Annotated[
        str, typer.Argument(callback=unquoted_path, help="Run folder of `salun erase`, or any model (with --against)")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            callback=unquoted_path, help="Folder of the results (default: the run folder, or attacks/<time>-…)"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the attacks and their estimated time; write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Attack an erased model: does the concept come back? Repeat the command to continue it."""
    if dry_run:
        from salun.diffusion.attack_estimate import preview_attack

        with terminal_progress(as_json) as progress:
            planned = preview_attack(target, options, progress)
        print_result(planned, as_json, _planned_lines(planned))
        return
    from salun.diffusion.attack import attack as run_attack
    from salun.diffusion.attack_output import check_attack_folder, write_attack
    from salun.errors import fill
    from salun.report.attacks import attack_banner, attack_lines
    from salun.report.metrics import lines_of
    from salun.runs.folder import new_run_folder

    is_run = (Path(target).expanduser() / "run.json").is_file()
    named = Path(target).expanduser() if is_run else new_run_folder("-".join(options.concept), Path("attacks"))
    folder = output or named
    check_attack_folder(folder)
    with terminal_progress(as_json) as progress, repeatable():
        report = run_attack(target, options, progress, shlex.join(["salun", *sys.argv[1:]]))
        files = write_attack(report, folder)
    data = report.as_json()
    lines = [fill(line, flag) for line in lines_of(attack_banner(data))]
    print_result(
        data, as_json, [*report.record.notes, *lines, *attack_lines(data), *(str(file.absolute()) for file in files)]
    )


def _planned_lines(planned: dict[str, Any]) -> list[str]:
    """What a dry run found: each attack, and the time of all."""
    also = ", and the original as well" if planned["control"] else ""
    lines = [
        *planned["notes"],
        f"model:    {planned['model']} (original: {planned['original']}){also}",
        f"concepts: {', '.join(concept['name'] for concept in planned['concepts'])}",
        f"prompts:  {planned['n']} of each concept; detector: {planned['detector']}",
    ]
    for each in planned["attacks"]:
        time = duration_range(each["least"], each["most"])
        lines.append(f"          {each['title']}: {each['passes']:,} passes, {time}")
    total = duration_range(planned["least"], planned["most"])
    return [*lines, f"time:     {total} on {planned['device']}, with images and the detector"]
