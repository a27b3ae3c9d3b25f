"""Resuming from the command line: the options that a run folder's record gives, and the command that resumes a run."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.display import printable
from salun.errors import Cancelled, ConfigError, literal

from . import interrupt
from .output import print_result, unquoted_path

DELTA = ".salun.safetensors"
DEFAULT_OUTPUTS = ("model/", "model.safetensors", "delta.salun.safetensors")  # in the folder of a run without `output`

ANOTHER = "Name another folder"
COMMAND_OF_OPTION = {  # checked in order: an option that the commands after it do not have
    "attacked": "compare",
    "concept": "erase",
    "methods": "classify-compare",
    "forget": "classify-unlearn",
    "label_dropout": "train",
    "data": "classify-train",
}

Config = Annotated[
    Path | None,
    typer.Option(
        callback=unquoted_path, help="Read options from YAML or a run.json; the command line takes precedence"
    ),
]


def unfinished(folder: Path | None, resume: bool, kind: type, wanted: Mapping[str, Any], as_json: bool) -> Any:
    """The record of the unfinished run in a folder, or None if there is no run.

    A finished run ends the command with exit code 0 and the path of its report, but for a comparison in which erasures
    failed: these are made again.

    Args:
        folder: The run folder.
        resume: Whether a run is to be resumed.
        kind: The class of the command's options.
        wanted: The options that the command line or a config file gives.
        as_json: Whether a finished run is printed as JSON.

    Raises:
        ConfigError: No folder is given to resume from; or the folder holds a run of another command, or a finished run
            with other options or without one of the wanted outputs.
    """
    from salun.errors import DataError
    from salun.runs.reading import read_run

    if resume and folder is None:
        raise ConfigError("needs the folder of the run to resume", option="resume", advice=_folders_to_resume())
    if not resume or folder is None or not os.path.lexists(folder / "run.json"):
        return None
    try:
        record = read_run(folder)
    except DataError as error:
        raise ConfigError(f"is {folder}: {error}", option="run_dir") from error
    made_by, command = _command_of(record["options"]), _command_of([item.name for item in dataclasses.fields(kind)])
    if made_by not in (None, command):
        raise ConfigError(
            f"is {folder}, which contains a run of `salun {made_by}`, not {command}", option="run_dir", advice=ANOTHER
        )
    if record["status"] == "done" and not record.get("failed"):
        _check_finished(record, folder, wanted)
        report = folder / "report.html"
        line = f"the run in {folder} is finished"
        print_result(dict(record), as_json, [line, f"report: {report}"] if report.is_file() else [line])
        raise typer.Exit(0)
    return record


def _folders_to_resume() -> str:
    """The advice that names the newest unfinished runs in the default place."""
    from salun.errors import DataError, some
    from salun.runs.reading import read_run

    unfinished = []
    for file in sorted(Path("runs").glob("*/run.json"), reverse=True)[:50]:
        with suppress(DataError):
            if read_run(file.parent)["status"] != "done":
                unfinished.append(str(file.parent))
    return "Give it by {run_dir}" + (literal(f". Unfinished: {some(unfinished)}") if unfinished else "")


def resume_line(folder: Path) -> str:
    """The command that resumes an unfinished run."""
    from salun.runs.reading import read_run

    command = _command_of(read_run(folder)["options"]) or "erase"
    return shlex.join(["salun", command, "--resume", "--run-dir", str(folder)])


def note_new_run(folder: Path, resume: bool, quiet: bool) -> None:
    """Tell that a run starts where one to resume was expected."""
    if resume and not quiet and not os.path.lexists(folder / "run.json"):
        typer.echo(printable(f"There is no run in {folder} to resume; a new one starts"), err=True)


def recorded(record: Mapping[str, Any], folder: Path, kind: type, given: Container[str]) -> dict[str, Any]:
    """The options of a run to resume, without those that the command line gives.

    A run.json may be untrusted input, so it permits neither writing outside its folder nor reading a pickle: only the
    command line does.
    """
    from salun.config import read_record

    read = read_record(record, folder / "run.json", kind)
    if record["options"].get("output") and "output" not in given:
        read["output"] = _checked_outputs(record["options"]["output"], folder)
    return {name: value for name, value in read.items() if name not in given}


def with_config(
    options: Any, given: set[str], config: Path | None, resume: bool, run_dir: Path | None, as_json: bool
) -> Any:
    """The options with a config file's values, or those of the run to resume, where the command line gives none."""
    read: dict[str, Any] = {}
    if config is not None:
        from salun.config import read_config

        read = read_config(config, type(options))
    wanted = {**read, **{name: getattr(options, name) for name in given}}
    record = unfinished(run_dir, resume, type(options), wanted, as_json)
    if config is None and record is not None and run_dir is not None:
        read = recorded(record, run_dir, type(options), given)
    return dataclasses.replace(options, **{name: value for name, value in read.items() if name not in given})


def _command_of(options: Container[str]) -> str | None:
    return next((command for option, command in COMMAND_OF_OPTION.items() if option in options), None)


def _check_finished(record: Mapping[str, Any], folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError if a finished run has other options than those wanted, or lacks a wanted output."""
    from salun.checkpoints.safetensors_io import truncated
    from salun.runs.record import INPUTS, NOT_IN_FINGERPRINT

    for name, value in wanted.items():
        if name in (*NOT_IN_FINGERPRINT, "methods", "anchor") or value is None:
            continue
        before = record["options"].get(name, value)
        if before != value and not (name in INPUTS and _same_path(before, value)):
            difference = f"{name} {truncated(repr(before))}, not {truncated(repr(value))}"
            raise ConfigError(
                f"is {folder}, which contains a finished run with {difference}", option="run_dir", advice=ANOTHER
            )
    written = record["options"].get("output") or [str(folder / name) for name in DEFAULT_OUTPUTS]
    for output in wanted.get("output") or []:
        exists = os.path.exists(os.path.expanduser(output))
        if not exists or not any(_same_path(output, other) for other in written):
            why = f"did not write {output}" if exists else f"has no output {output}"
            raise ConfigError(
                f"is {folder}, which contains a finished run that {why}",
                option="run_dir",
                advice=_how_to_write(output, written, record),
            )


def _same_path(value: Any, other: Any) -> bool:
    """Whether two values are paths of the same file or folder."""
    if not (isinstance(value, str) and isinstance(other, str)):
        return False
    return os.path.realpath(os.path.expanduser(value)) == os.path.realpath(os.path.expanduser(other))


def _how_to_write(output: str, written: Sequence[str], record: Mapping[str, Any]) -> str:
    """The advice on how to write an output from the delta of a finished run."""
    model = record["options"].get("model") or "MODEL"
    delta = next((path for path in written if path.endswith(DELTA) and os.path.isfile(path)), None)
    if delta is None:
        return "Run it again in another folder"
    if output.endswith(DELTA):
        return literal(f"Copy its delta, {delta}")
    if output.endswith((".lora.safetensors", ".diff.safetensors")):
        command = ["salun", "delta", "export", delta, "--base", model, "--output", output]
    else:
        command = ["salun", "delta", "apply", model, delta, "--output", output]
    return literal(f"Write it by `{shlex.join(command)}`")


def _checked_outputs(outputs: Sequence[str], folder: Path) -> list[str]:
    """The outputs of a record. Raises ConfigError for one outside the run folder, links resolved."""
    root = Path(os.path.realpath(folder))
    if any(root not in Path(os.path.realpath(output)).parents for output in outputs):
        more = f" and {len(outputs) - 3} more" if len(outputs) > 3 else ""
        again = " ".join(f"--output {shlex.quote(output[:500])}" for output in outputs[:3])
        raise ConfigError(
            f"is {folder}, whose run.json names outputs outside the run folder",
            option="run_dir",
            advice=literal(f"To write them, add {again}{more}; to write elsewhere, add another --output"),
        )
    return list(outputs)


@contextmanager
def recorded_model(name: str | None) -> Iterator[None]:
    """Context manager: if the model that a record names is missing, the error advises to give `model`."""
    from salun.checkpoints.locate import ModelNotFound
    from salun.user_text import unquoted

    try:
        yield
    except ModelNotFound as error:
        if name is not None and error.name == unquoted(name):
            error.advice = "If it was moved, give its new path by {model}"
        raise


@contextmanager
def resumable(command: str, folder: Path, extra: Sequence[str] = ()) -> Iterator[None]:
    """Context manager: an interrupted run prints the command that resumes it.

    Args:
        command: The command of the run.
        folder: Its run folder.
        extra: Arguments that are not read from a record and have to be repeated.
    """
    again = "interrupted; resume with: " + shlex.join(["salun", command, "--resume", "--run-dir", str(folder), *extra])
    with _interrupted(again, lambda: (folder / "run.json").exists()):
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """Context manager: an interrupted command says that it continues, by the cache, when it is repeated."""
    with _interrupted("interrupted. Run the command again to continue it", lambda: True):
        yield


@contextmanager
def _interrupted(again: str, continues: Callable[[], bool]) -> Iterator[None]:
    """Context manager: an interrupted command prints a line, if there is something to continue."""

    def line() -> str:
        return printable(again) if continues() else interrupt.ENDED

    with interrupt.exit_message(line):
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Cancelled | KeyboardInterrupt) or interrupt.stopping()
            if not stopped or not continues():
                raise
            raise Cancelled(again, line=again) from error
