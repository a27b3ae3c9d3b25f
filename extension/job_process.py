"""The child process of a job: starting, stopping and ending it, and removing its partial files."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from salun.files import recover_interrupted_write, remove_leftovers
from salun.progress import Stage
from salun.runs.folder import FILES

from .jobs import Job

CHILD = Path(__file__).resolve().parent
GRACE = 1.0  # seconds after a cancel until an unresponsive child is killed
MAX_STEP = 30.0  # maximum seconds to wait for a training step to end
FINISHING = 120.0  # seconds to wait for a child that is stopping or writing files
WRITING = (Stage.STOPPING, Stage.SAVING, Stage.WRITING, Stage.EXPORTING)
CREATE_NO_WINDOW = 0x08000000
logger = logging.getLogger("salun")


def start(python: str, folder: Path, log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start the process for the request in `folder`. Raises OSError."""
    variables = {**os.environ, **environment, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    variables.pop("PYTHONPATH", None)  # the host's modules are not the child's
    apart: dict[str, Any] = (
        {"creationflags": CREATE_NO_WINDOW} if sys.platform == "win32" else {"start_new_session": True}
    )
    return subprocess.Popen(
        [python, str(CHILD), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables, cwd=folder,
        encoding="utf-8", errors="replace", **apart,
    )  # fmt: skip


def ask_to_stop(child: subprocess.Popen[str]) -> None:
    """Ask a child to stop at its next step."""
    assert child.stdin is not None
    with suppress(OSError, ValueError):  # it has ended already
        child.stdin.write("stop\n")
        child.stdin.flush()


def patience(stage: str, pace: float) -> float:
    """Seconds to wait for a child that was asked to stop. stage: its stage. pace: seconds of its last training step."""
    if stage in WRITING:
        return FINISHING
    if stage == Stage.TRAINING:  # it stops at the end of the step, and saves its state
        return max(GRACE, min(2 * pace, MAX_STEP))
    return GRACE


def end_soon(child: subprocess.Popen[str], patience: Callable[[], float]) -> bool:
    """Kill a child that does not stop within `patience()` seconds. Returns whether it was killed."""
    began = time.monotonic()
    while child.poll() is None and time.monotonic() - began <= patience():
        time.sleep(0.05)
    if child.poll() is None:
        child.kill()
        return True
    return False


def end(child: subprocess.Popen[str]) -> None:
    """Kill a child that still runs, and close its pipes."""
    if child.poll() is None:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # nobody reads what was still to be written to it
            if pipe is not None:
                pipe.close()


def remove_partial_files(job: Job) -> None:
    """Remove the partial files of a child that was killed."""
    try:
        for path in job.outputs:
            recover_interrupted_write(Path(path))
        if job.options.get("run_dir"):
            for name in FILES:
                remove_leftovers(Path(job.options["run_dir"]) / name)
    except OSError as error:
        logger.warning("the job %s left a partial file: %s", job.id, error)


def failure_text(log: Path, code: int) -> str:
    """The error message for a child that ended without one, from its log."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    last = f": {lines[-1][:300]}" if lines else ""
    killed = " (killed, most often because memory ran out)" if code in (-9, 137) else ""
    return f"the job's process ended with code {code}{killed}{last}"
