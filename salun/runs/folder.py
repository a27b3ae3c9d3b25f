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
    "state/mask.safetensors", "state/training.safetensors",
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

    Raises ConfigError for a finished one, for an unfinished one without `resume`, and for a run.json that is none.
    """
    if not os.path.lexists(folder / "run.json"):
        return None
    try:
        found = read_run(folder)
    except DataError as error:
        raise ConfigError(f"--run-dir {folder}: {error}") from error
    status = found["status"]
    if status == "done":
        raise ConfigError(f"--run-dir {folder} holds a finished run: see its report.html, or name another folder")
    if not resume:
        raise ConfigError(
            f"--run-dir {folder} holds an unfinished run ({status}): go on with it by --resume, or name another folder"
        )
    return found


def check_links(folder: Path) -> None:
    """Raises ConfigError if the folder has a link, a pipe or a device where a run writes: its target would be written.

    The folder may be untrusted input, one that somebody else made for a run to be resumed in.
    """
    for name in (".lock", "log.txt", STATE, "jobs", *FILES):
        place = folder / name
        mode = place.lstat().st_mode if os.path.lexists(place) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise ConfigError(f"--run-dir {folder}: {name} in it is {kind}, where the run writes. Remove it")


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Within, no other run can work in the folder, nor after a crash be kept out of it: the system holds the lock.

    Raises ConfigError if another is at work there, or the folder cannot be made.
    """
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        busy = f"--run-dir {folder}: another run is at work there; wait for it, or name another"
        raise ConfigError(busy, code="busy") from error
    except OSError as error:
        raise ConfigError(f"--run-dir {folder} cannot be written ({error.strerror}): name another folder") from error
    try:
        yield
    finally:
        lock.release()
