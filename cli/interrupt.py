"""Ctrl-C ends the program with one line and exit code 130 at any moment, even during imports and cleanup.

A KeyboardInterrupt during an import leaves a package half imported, and its error handling may then fail. So the
process ends at once while no work is running. Work stops at its next step, or at a second Ctrl-C, and cleans up its
files; a third Ctrl-C ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CODE = 130
LINE = "interrupted; no partial file was left. Run the command again to restart"
ENDED = "interrupted. Run the command again to restart"  # where nothing was cleaned up
_state = "idle"  # working → stepping → interrupted → stopping
_line: Callable[[], str] | None = None  # what to print when the process ends at once, if not `ENDED`


def install() -> None:
    """Install the handler of Ctrl-C. To be called before anything heavy is imported."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _state
    if _state == "stepping":
        _state = "interrupted"
    elif _state in ("working", "interrupted"):
        _state = "stopping"
        sys.unraisablehook = lambda _: None  # of an interrupt inside a destructor, Python would print a traceback
        raise KeyboardInterrupt
    else:
        leave(_line() if _line is not None else ENDED)


def leave(line: str) -> None:
    """End the process now with one line. No destructor runs, since one may fail in a half-imported package."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or in the middle of a write
            stream.flush()
    with suppress(OSError):
        os.write(2, f"salun: {' '.join(line.split())}\n".encode("utf-8", "backslashreplace"))
    os._exit(CODE)


@contextmanager
def working() -> Iterator[None]:
    """Context manager: the first Ctrl-C raises KeyboardInterrupt, or makes `step` return True once it was called."""
    global _state
    previous = signal.signal(signal.SIGINT, _handle)
    _state = "working"
    try:
        yield
    finally:
        if _state != "stopping":
            _state = "idle"
        signal.signal(signal.SIGINT, previous)


@contextmanager
def exit_message(line: Callable[[], str]) -> Iterator[None]:
    """Context manager: a Ctrl-C that ends the process at once prints this line. It stays after an error."""
    global _line
    _line = line
    yield
    _line = None


def step() -> bool:
    """Called at every step of work. Returns whether the user has pressed Ctrl-C."""
    global _state
    if _state == "working":
        _state = "stepping"
    return _state in ("interrupted", "stopping")


def stopping() -> bool:
    """Whether the work was interrupted, so that an error is most likely a consequence."""
    return _state == "stopping"
