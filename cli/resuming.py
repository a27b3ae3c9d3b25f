"""Resuming from the command line: what a run folder's record gives, what it must not, and how to resume later."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from salun.display import printable
from salun.errors import Cancelled, ConfigError

from . import interrupt
from .output import tell

DELTA = ".salun.safetensors"
DEFAULT_OUTPUTS = ("model/", "model.safetensors", "delta.salun.safetensors")  # in the folder of a run given no --output

MARKS = {  # the option that only a run of this command has; a run of the last has none of the others
    "concept": "erase",
    "methods": "classify-compare",
    "forget": "classify-unlearn",
    "data": "classify-train",
}


def unfinished(folder: Path | None, resume: bool, kind: type, wanted: Mapping[str, Any], as_json: bool) -> Any:
    """The record of the run in the folder that is to be resumed; None where there is none.

    A finished run ends the command: exit code 0, and where its report is. wanted: the options that the command line or
    a config file gives. Raises ConfigError for a run of another command than that of the options' class `kind`, and for
    a finished run of other options or without a wanted output.
    """
    from salun.errors import DataError
    from salun.runs.reading import read_run

    if not resume or folder is None or not os.path.lexists(folder / "run.json"):
        return None
    try:
        record = read_run(folder)
    except DataError as error:
        raise ConfigError(f"--run-dir {folder}: {error}") from error
    made_by, command = _command_of(record["options"]), _command_of([item.name for item in dataclasses.fields(kind)])
    if made_by not in (None, command):
        raise ConfigError(f"--run-dir {folder} holds a run of `salun {made_by}`, not {command}: name another folder")
    if record["status"] == "done":
        _check_finished(record, folder, wanted)
        report = folder / "report.html"
        line = f"the run in {folder} is finished"
        tell(dict(record), as_json, [line, f"report: {report}"] if report.is_file() else [line])
        raise typer.Exit(0)
    return record


def recorded(record: Mapping[str, Any], folder: Path, kind: type, given: Container[str]) -> dict[str, Any]:
    """The options of a run that is to be resumed, without those given on the command line.

    A run.json may be untrusted input. It allows neither files outside its folder to be written nor a pickle to be read:
    only the command line does.
    """
    from salun.config import read_record

    read = read_record(record, folder / "run.json", kind)
    if record["options"].get("output") and "output" not in given:
        read["output"] = _own_outputs(record["options"]["output"], folder)
    return {name: value for name, value in read.items() if name not in given}


def _command_of(options: Container[str]) -> str | None:
    return next((command for mark, command in MARKS.items() if mark in options), None)


def _check_finished(record: Mapping[str, Any], folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raises ConfigError if a finished run had other options than those wanted, or an output wanted is not there."""
    from salun.checkpoints.safetensors_io import truncated
    from salun.runs.record import INPUTS, NOT_IN_FINGERPRINT

    for name, value in wanted.items():
        if name in (*NOT_IN_FINGERPRINT, "methods", "anchor") or value is None:
            continue
        had = record["options"].get(name, value)
        if had != value and not (name in INPUTS and _same_place(had, value)):
            told = f"{name} {truncated(repr(had))}, not {truncated(repr(value))}"
            raise ConfigError(f"--run-dir {folder} holds a finished run with {told}: name another folder")
    written = record["options"].get("output") or [str(folder / name) for name in DEFAULT_OUTPUTS]
    for place in wanted.get("output") or []:
        there = os.path.exists(os.path.expanduser(place))
        if not there or not any(_same_place(place, other) for other in written):
            why = "which did not write" if there else "and there is no"
            raise ConfigError(
                f"--run-dir {folder} holds a finished run, {why} {place}: {_how_to_write(place, written, record)}"
            )


def _same_place(one: Any, other: Any) -> bool:
    """Whether two values are paths to the same place."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def _how_to_write(place: str, written: Sequence[str], record: Mapping[str, Any]) -> str:
    """What writes an output from the delta of a finished run."""
    model = record["options"].get("model") or "MODEL"
    delta = next((path for path in written if path.endswith(DELTA) and os.path.isfile(path)), None)
    if delta is None:
        return "run it again in another folder"
    if place.endswith(DELTA):
        return f"copy its delta, {delta}"
    if place.endswith((".lora.safetensors", ".diff.safetensors")):
        return f"write it by `{shlex.join(['salun', 'delta', 'export', delta, '--base', model, '--output', place])}`"
    return f"write it by `{shlex.join(['salun', 'delta', 'apply', model, delta, '--output', place])}`"


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
def recorded_model(name: str | None) -> Iterator[None]:
    """Within, that a run's recorded model is not found any more says how to name it. None: it is given otherwise."""
    from salun.checkpoints.locate import ModelNotFound
    from salun.user_text import unquoted

    try:
        yield
    except ModelNotFound as error:
        if name is None or error.name != unquoted(name):
            raise
        raise ModelNotFound(f"{error}. If it was moved, give its new path by --model", name) from error


@contextmanager
def resumable(command: str, folder: Path, extra: Sequence[str] = ()) -> Iterator[None]:
    """Within, a run that is stopped says how to resume it. extra: what only the command line allows, to be repeated."""
    again = "stopped; go on with: " + shlex.join(["salun", command, "--resume", "--run-dir", str(folder), *extra])

    def line() -> str:
        return printable(again) if (folder / "run.json").exists() else interrupt.ENDED

    with interrupt.telling(line):
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Cancelled | KeyboardInterrupt) or interrupt.stopping()
            if not stopped or not (folder / "run.json").exists():
                raise
            raise Cancelled(again, line=again) from error
