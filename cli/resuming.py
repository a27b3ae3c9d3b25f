"""Resuming from the command line: what a run folder's record gives, what it must not, and how to resume later."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from salun.errors import Cancelled, ConfigError

from . import interrupt
from .output import tell


def recorded(folder: Path | None, resume: bool, kind: type, given: Mapping[str, Any], as_json: bool) -> dict[str, Any]:
    """The options of the run in the folder that is to be resumed, without those given on the command line.

    A run.json may be untrusted input. It allows neither files outside its folder to be written nor a pickle to be read:
    only the command line does. Empty where there is no run. A finished run ends the command: exit code 0, and where its
    report is.
    """
    from salun.config import read_record
    from salun.errors import DataError
    from salun.run_reading import read_run

    if not resume or folder is None or not os.path.lexists(folder / "run.json"):
        return {}
    try:
        record = read_run(folder)
    except DataError as error:
        raise ConfigError(f"--run-dir {folder}: {error}") from error
    if record["status"] == "done":
        _finished(record, folder, given, as_json)
    read = read_record(record, folder / "run.json", kind)
    if record["options"].get("output") and "output" not in given:
        read["output"] = _own_outputs(record["options"]["output"], folder)
    return {name: value for name, value in read.items() if name not in given}


def _finished(record: Mapping[str, Any], folder: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Say that a run is finished, and end the command. Raises ConfigError if other options are given than it had."""
    from salun.formats.tensorfile import shortened
    from salun.run_record import INPUTS, NOT_DECISIVE

    for name, value in given.items():
        had = record["options"].get(name, value)
        if name not in (*INPUTS, *NOT_DECISIVE, "methods", "anchor") and had != value:
            told = f"{name} {shortened(repr(had))}, not {shortened(repr(value))}"
            raise ConfigError(f"--run-dir {folder} holds a finished run with {told}: name another folder")
    report = folder / "report.html"
    line = f"the run in {folder} is finished"
    tell(dict(record), as_json, [line, f"report: {report}"] if report.is_file() else [line])
    raise typer.Exit(0)


def _own_outputs(outputs: Sequence[str], folder: Path) -> list[str]:
    """The outputs of a record, which must be inside the run folder, links resolved. Raises ConfigError otherwise."""
    root = Path(os.path.realpath(folder))
    if any(root not in Path(os.path.realpath(place)).parents for place in outputs):
        more = f" and {len(outputs) - 3} more" if len(outputs) > 3 else ""
        again = " ".join(f"--output {shlex.quote(place[:500])}" for place in outputs[:3])
        raise ConfigError(
            f"--run-dir {folder}: its run.json names outputs outside the run folder. To write them, add {again}{more}; "
            "for other places, other --output"
        )
    return list(outputs)


@contextmanager
def resumable(command: str, folder: Path, extra: Sequence[str] = ()) -> Iterator[None]:
    """Within, a run that is stopped says how to resume it. extra: what only the command line allows, to be repeated."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Cancelled | KeyboardInterrupt) or interrupt.stopping()
        if not stopped or not (folder / "run.json").exists():
            raise
        again = shlex.join(["salun", command, "--resume", "--run-dir", str(folder), *extra])
        raise Cancelled(f"stopped; go on with: {again}") from error
