"""Progress on a terminal: one bar for the stage at hand, time left, messages above it. And Ctrl-C as `Cancelled`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from salun.errors import Cancelled
from salun.progress import Event, Progress


@contextmanager
def terminal_progress(quiet: bool) -> Iterator[Progress]:
    """A progress that draws on stderr (nothing if `quiet`), and raises `Cancelled` at the next step after Ctrl-C."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        stopping = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        with _bars(quiet) as show:

            def progress(event: Event, /) -> None:
                if stopping:
                    raise Cancelled("stopped")
                show(event)

            yield progress
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _bars(quiet: bool) -> Iterator[Any]:
    if quiet or not sys.stderr.isatty():
        yield (lambda event: None) if quiet else _plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event.message:
                bars.console.print(printable(event.message), markup=False, highlight=False)
            if not event.total:
                return
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, figures="")
            figures = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
            bars.update(tasks[event.stage], completed=event.step, total=event.total, figures=figures)

        yield show


def printable(text: str) -> str:
    """A text without anything that a terminal would obey: control characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_last: dict[str, int] = {}


def _plain(event: Event) -> None:
    """Without a terminal: a line per message and per tenth of a stage."""
    if event.message:
        print(printable(event.message), file=sys.stderr, flush=True)
    if event.total:
        tenth = 10 * event.step // event.total
        if event.step == 1 or tenth != _last.get(event.stage, -1):
            _last[event.stage] = tenth
            figures = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
            print(f"{event.stage} {event.step}/{event.total}  {figures}".rstrip(), file=sys.stderr, flush=True)
