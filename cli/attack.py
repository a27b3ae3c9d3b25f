"""`salun attack`: does an erased concept come back?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from salun.diffusion.attack_options import GROUPS, AttackOptions

from .app import app
from .options import with_options
from .output import Json, flag, print_result, unquoted_path
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
    as_json: Json = False,
) -> None:
    """Attack an erased model: does the concept come back? Repeat the command to continue it."""
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
