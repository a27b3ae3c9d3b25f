"""Ctrl-C: one line and exit code 130 at any moment, during imports and while a run is being stopped too.

A KeyboardInterrupt in the middle of an import leaves a package half imported, and its error handling fails in its own
ways. So the process ends at once while nothing is under way. Work stops at its next step, or at a second Ctrl-C, with
its files cleaned up; a third ends the process.
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
LINE = "stopped; no half-written file is left. Give the command again to start over"
ENDED = "stopped. Give the command again to start over"  # where nothing was cleaned up
_state = "idle"  # working → stepping → asked → stopping
_line: Callable[[], str] | None = None  # what to tell where the process ends at once, if not `ENDED`


def install() -> None:
    """Take over Ctrl-C. To be called before anything heavy is imported."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _state
    if _state == "stepping":
        _state = "asked"
    elif _state in ("working", "asked"):
        _state = "stopping"
        sys.unraisablehook = lambda _: None  # of an interrupt inside a destructor, Python would print a traceback
        raise KeyboardInterrupt
    else:
        leave(_line() if _line is not None else ENDED)


def leave(line: str) -> None:
    """End the process now with one line: no destructor runs, so that nothing can fail half imported."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or in the middle of a write
            stream.flush()
    with suppress(OSError):
        os.write(2, f"salun: {' '.join(line.split())}\n".encode("utf-8", "backslashreplace"))
    os._exit(CODE)


@contextmanager
def working() -> Iterator[None]:
    """Within, the first Ctrl-C raises KeyboardInterrupt, or after `step` was called waits for the next call of it."""
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
def telling(line: Callable[[], str]) -> Iterator[None]:
    """Within, and after an error, a Ctrl-C that ends the process at once tells this line."""
    global _line
    _line = line
    yield
    _line = None


def step() -> bool:
    """Called at every step of work. Returns whether the user has asked to stop."""
    global _state
    if _state == "working":
        _state = "stepping"
    return _state in ("asked", "stopping")


def stopping() -> bool:
    """Whether the work was interrupted: an error after that is most likely a consequence."""
    return _state == "stopping"
