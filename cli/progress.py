"""Progress on a terminal: one bar with the time left, messages above it. Ctrl-C becomes `Cancelled`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from salun.display import bar, lines, shown
from salun.errors import Cancelled
from salun.progress import Event, Progress, Stage, silent

from . import interrupt


@contextmanager
def terminal_progress(quiet: bool, folder: Path | None = None) -> Iterator[Progress]:
    """A progress that draws on stderr (nothing if `quiet`), and raises `Cancelled` at the next step after Ctrl-C.

    folder: The run folder, which is shown at the first event, after the plan.
    """
    unshown = [folder] if folder is not None else []
    drawn = shown(silent) if quiet else bar() if sys.stderr.isatty() else lines(sys.stderr)
    with interrupt.working():
        try:
            with drawn as show:
                with suppress(OSError, ValueError):
                    if folder is not None:
                        show(Event(Stage.LOADING))

                def progress(event: Event, /) -> None:
                    if interrupt.step():
                        raise Cancelled("stopped")
                    with suppress(OSError, ValueError):  # the terminal is closed; the run continues
                        show(event)
                        if unshown:  # only now: no check before the first event has failed
                            show(Event(event.stage, message=f"Run folder: {unshown.pop().absolute()}"))

                yield progress
        except BaseException as error:  # an interrupted library may raise anything
            if isinstance(error, Cancelled) or not interrupt.stopping():
                raise
            raise Cancelled("stopped") from error
