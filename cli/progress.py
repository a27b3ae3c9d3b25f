"""Progress on a terminal: one bar per stage, time left, messages above it. Ctrl-C becomes `Cancelled`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from salun.display import bars, lines, shown
from salun.errors import Cancelled
from salun.progress import Event, Progress, silent

from . import interrupt


@contextmanager
def terminal_progress(quiet: bool) -> Iterator[Progress]:
    """A progress that draws on stderr (nothing if `quiet`), and raises `Cancelled` at the next step after Ctrl-C."""
    drawn = shown(silent) if quiet else bars() if sys.stderr.isatty() else lines(sys.stderr)
    with interrupt.working():
        try:
            with drawn as show:

                def progress(event: Event, /) -> None:
                    if interrupt.step():
                        raise Cancelled("stopped")
                    with suppress(OSError, ValueError):  # the terminal is closed; the run continues
                        show(event)

                yield progress
        except BaseException as error:  # an interrupted library may raise anything
            if isinstance(error, Cancelled) or not interrupt.stopping():
                raise
            raise Cancelled("stopped") from error
