"""The run folder: its name, its lock, and whether a run may begin or resume in it."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, DataError
from salun.runs.reading import read_run

STATE = "state"


FILES = (
    "run.json", "mask.safetensors", "before_after.png", "report.html", "delta.salun.safetensors", "model",
    "model.safetensors", "split.json",
    "state/mask.safetensors", "state/training.safetensors", "state/earlier.safetensors",
)  # fmt: skip


def new_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """`runs/<time>-<name>`, with a name that every system allows, not there yet."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "run"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}"
    folder, count = root / stem, 1
    while folder.exists():
        count += 1
        folder = root / f"{stem}-{count}"
    return folder


def check_folder(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The unfinished run that a folder holds, to be resumed; None where it holds none.

    A finished comparison with erasures that failed can be resumed too, which makes these again.

    Raises ConfigError for a finished one, for an unfinished one without `resume`, and for an invalid run.json.
    """
    if not os.path.lexists(folder / "run.json"):
        return None
    try:
        record = read_run(folder)
    except DataError as error:
        raise ConfigError(f"cannot be used: {error}", option="run_dir") from error
    status = record["status"]
    if status == "done" and not (resume and record.get("failed")):
        raise ConfigError(
            f"{folder} holds a finished run",
            option="run_dir",
            advice="See its report.html, or choose another folder",
            code="finished",
        )
    if not resume:
        raise ConfigError(
            f"{folder} holds an unfinished run ({status})",
            option="run_dir",
            advice="Add {resume} to continue it, or choose another folder",
            code="unfinished",
        )
    return record


def check_links(folder: Path) -> None:
    """Raises ConfigError if the folder has a link, a pipe or a device where a run writes: its target would be written.

    The folder may be untrusted input, made by somebody else for a run to resume in.
    """
    for name in (".lock", "log.txt", STATE, "jobs", "compare.csv", "search.json", *FILES):
        place = folder / name
        mode = place.lstat().st_mode if os.path.lexists(place) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise ConfigError(
                f"{folder}: {name} in it is {kind}, where the run writes", option="run_dir", advice="Remove it"
            )


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Context manager: no other run can use the folder. The system holds the lock, so a crash releases it.

    Raises ConfigError if another run uses the folder, or it cannot be made.
    """
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(
            f"{folder} is in use by another run",
            option="run_dir",
            advice="Wait for it to end, or choose another folder",
            code="in-use",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror})", option="run_dir", advice="Choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
