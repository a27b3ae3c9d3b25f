"""Reading a `run.json`: untrusted input, opened only as a regular file, in bounded size and depth, and type-checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.errors import DataError
from salun.untrusted import read_text

SCHEMA = 1
STATUSES = ("running", "done", "failed", "cancelled")
MAX_BYTES = 16_000_000  # of a run.json: about 240,000 training steps
MAX_DEPTH = 32  # of nested lists and objects in it


def blank_record() -> dict[str, Any]:
    """Every part of a record, with the value of a run that has done nothing yet."""
    return {
        "schema": SCHEMA,
        "status": "",
        "command": "",
        "options": {},
        "device": "",
        "facts": {},
        "resumed": 0,
        "concepts": [],
        "notes": [],
        "seed": 0,
        "versions": {},
        "inputs": [],
        "outputs": [],
        "timings": {},
        "peak_memory": {"cpu_bytes": None, "device_bytes": None},
        "mask": None,
        "rounding": None,
        "losses": [],
        "metrics": {},
    }


def read_run(folder: Path) -> dict[str, Any]:
    """The record in a run folder, which may be untrusted input.

    Returns:
        Every part of a record: a part that the file lacks has the value of a run that has done nothing; a number
        that is NaN or infinite becomes None. The values of `options` (except `model`, `concept` and `output`) and the
        contents of `mask`, `metrics`, `concepts` and `losses` are not checked.

    Raises:
        DataError: run.json is missing, is not a regular file, is too large or too deeply nested, is not JSON, or holds
            a value of a wrong type, or text with NUL or an unpaired surrogate.
    """
    file = folder / "run.json"
    try:
        record = read_json(file)
        _check_record(record)
    except OSError as error:
        reason = "there is no run.json in it" if isinstance(error, FileNotFoundError) else f"run.json: {error.strerror}"
        raise DataError(f"{folder} is not a run folder ({reason}). Choose a folder that a run has made") from error
    except ValueError as error:
        raise DataError(f"{file} is not a valid record of a run: {error}. Choose another run") from error
    return {**blank_record(), "error": None, **record}


def read_json(file: Path) -> Any:
    """The value in a JSON file, which may be untrusted input; a number that is NaN or infinite becomes None.

    Raises OSError, or ValueError for what `read_run` calls invalid.
    """
    try:
        value = json.loads(
            read_text(file, MAX_BYTES), parse_constant=_no_number, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    _check_values(value)
    return value


def _no_number(text: str) -> None:
    """JSON has neither NaN nor infinity; Python's has both."""


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"it holds an integer of {len(text)} digits")
    return int(text)


def _check_values(value: Any, depth: int = 1) -> None:
    """Raises ValueError for nesting that is too deep, and for text that no file name, URL or file can hold."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for name in value:
            _check_values(name, depth)
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _check_values(each, depth + 1)
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ValueError("it holds text with NUL or an unpaired surrogate")


def _check_record(record: Any) -> None:
    """Raises ValueError for a part of a wrong type."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    record = {**blank_record(), "error": None, **record}
    if record["schema"] != SCHEMA or record["status"] not in STATUSES:
        raise ValueError(
            f"schema is {_shown(record['schema'])} and status {_shown(record['status'])}, "
            f"but must be {SCHEMA} and one of {', '.join(STATUSES)}"
        )
    options = record["options"] if isinstance(record["options"], dict) else {}
    kinds = {
        "an object": ("options", "facts", "versions", "timings", "peak_memory", "metrics"),
        "an object or null": ("mask", "rounding"),
        "a list": ("losses",),
        "a list of objects": ("concepts", "inputs", "outputs"),
        "a list of texts": ("notes",),
        "a text": ("command", "device"),
        "a text or null": ("error",),
        "an integer": ("resumed", "seed"),
    }
    values = [(name, kind, record[name]) for kind, names in kinds.items() for name in names]
    values += [(f"options.{name}", "a list of texts", options.get(name, [])) for name in ("concept", "output")]
    values.append(("options.model", "a text or null", options.get("model")))
    values += [(f"{part}.{name}", "a text", v) for part in ("facts", "versions") for name, v in _items(record[part])]
    values += [(f"timings.{name}", "a number", v) for name, v in _items(record["timings"])]
    files = [file for part in ("inputs", "outputs") for file in _listed(record[part])]
    values += [(f"a file's {name}", "a text", file.get(name)) for file in files for name in ("kind", "path")]
    for name, kind, value in values:
        if not _is(kind, value):
            raise ValueError(f"{name[:80]} is {_shown(value)}, but must be {kind}")


def _is(kind: str, value: Any) -> bool:
    if kind.endswith(" or null"):
        return value is None or _is(kind.removesuffix(" or null"), value)
    if kind.startswith("a list"):
        each = {"a list of texts": "a text", "a list of objects": "an object"}.get(kind)
        return isinstance(value, list) and (each is None or all(_is(each, item) for item in value))
    types = {"an object": (dict,), "a text": (str,), "an integer": (int,), "a number": (int, float)}[kind]
    return type(value) in types  # not isinstance: true and false are integers to Python


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _listed(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a finished erasure, which may be untrusted input. Raises DataError if the folder holds none."""
    record = read_run(folder)
    options, mask = record["options"], record["mask"]
    if "model" not in options or "concept" not in options:
        raise DataError(f"the run in {folder} is not an erasure (its command: {record['command'][:80]!r})")
    if record["status"] != "done":
        raise DataError(f"the run in {folder} is {record['status']}, not done, so it has no result yet")
    types = {"mode": str, "selected": int, "total": int}
    if mask is None or any(type(mask.get(name)) is not kind for name, kind in types.items()):
        raise DataError(f"{folder / 'run.json'} has no valid mask entry", advice="run the erasure again")
    return record


def file_of(record: Mapping[str, Any], folder: Path, kind: str) -> Path | None:
    """The first output of a kind inside the run folder, links followed; files outside are never read."""
    root = Path(os.path.realpath(folder))
    for entry in record["outputs"]:
        path = Path(os.path.realpath(folder / entry["path"]))
        if entry["kind"] == kind and root in path.parents and path.is_file():
            return path
    return None
