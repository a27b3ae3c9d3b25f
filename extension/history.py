"""What a list of runs tells of each. Whoever wrote a run's folder is not known: what cannot be read is told as such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, DataError
from salun.runs.reading import read_run

from .limits import MOST, truncated

DELTA = "delta.salun.safetensors"
SHOWN = {  # files of a run that the API hands out, and their types
    "report.html": "text/html; charset=utf-8",
    "before_after.png": "image/png",
    "run.json": "application/json",
    "log.txt": "text/plain; charset=utf-8",
    "mask.safetensors": "application/octet-stream",
    DELTA: "application/octet-stream",
}
UNREADABLE: dict[str, Any] = {
    "status": "unreadable", "concept": None, "model": "", "error": None, "headline": [], "figures": [], "files": [],
}  # fmt: skip


def options_in(run: Path) -> dict[str, Any]:
    """The options that a run's record tells, which may be untrusted input. Raises ConfigError for an unreadable one."""
    try:
        found: dict[str, Any] = read_run(run)["options"]
    except DataError as error:
        raise ConfigError(str(error)) from error
    return found


def summary(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of a record, what a list shows."""
    from salun.report.metrics import headline, metric_rows

    concepts = record["options"].get("concept")
    told: dict[str, Any] = {
        **UNREADABLE,
        "status": record["status"],
        "concept": [truncated(text) for text in concepts][:MOST] if concepts is not None else None,
        "model": truncated((record["options"].get("model") or "").replace("\\", "/").split("/")[-1]),
        "error": truncated(record["error"]) if record["error"] else None,
        "files": [name for name in SHOWN if (folder / name).is_file()],
    }
    try:
        if record["status"] == "done":
            rows = metric_rows(record["metrics"])[:MOST]
            told["headline"] = [truncated(line) for line in headline(record["concepts"], record["metrics"])][:MOST]
            told["figures"] = [[truncated(str(cell)) for cell in row] for row in rows]
    except Exception:  # whatever a stranger's figures are: the other runs are to be listed all the same
        told["error"] = "its run.json is of another version"
    return told
