"""The default display of progress: bars on a terminal, bars or lines in a notebook, nothing elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from salun.progress import Event, Progress, silent


@contextmanager
def shown(progress: Progress | None, quiet: bool = False) -> Iterator[Progress]:
    """Context manager: the given progress, or for None the display that suits the environment.

    quiet: Show nothing by default, as all processes but the first do.
    """
    if progress is not None or quiet:
        yield progress or silent
        return
    with _fitting()() as show:
        yield show


def _fitting() -> Callable[[], AbstractContextManager[Progress]]:
    """The display that suits the environment."""
    notebook = _in_notebook()
    if importlib.util.find_spec("rich") and (
        importlib.util.find_spec("ipywidgets") if notebook else sys.stderr is not None and sys.stderr.isatty()
    ):
        return bars
    return (lambda: lines(sys.stdout)) if notebook else _nothing


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code. IPython on a terminal counts as a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or type(shell).__module__.startswith("google.colab")


@contextmanager
def _nothing() -> Iterator[Progress]:
    yield silent


@contextmanager
def bars() -> Iterator[Progress]:
    """One bar per stage on stderr, with the time left and the metrics; messages above them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as drawn:
        tasks: dict[str, int] = {}

        def show(event: Event, /) -> None:
            if event.message:
                drawn.console.print(printable(event.message), markup=False, highlight=False)
            if not event.total:
                return
            if event.stage not in tasks:
                tasks[event.stage] = drawn.add_task(event.stage, total=event.total, metrics="")
            drawn.update(tasks[event.stage], completed=event.step, total=event.total, metrics=_metrics(event))  # type: ignore[arg-type]

        yield show


@contextmanager
def lines(stream: TextIO) -> Iterator[Progress]:
    """A line for each message and for each tenth of a stage."""
    last: dict[str, int] = {}

    def show(event: Event, /) -> None:
        if event.message:
            print(printable(event.message), file=stream, flush=True)
        if event.total:
            tenth = 10 * event.step // event.total
            if event.step == 1 or tenth != last.get(event.stage, -1):
                last[event.stage] = tenth
                print(f"{event.stage} {event.step}/{event.total}  {_metrics(event)}".rstrip(), file=stream, flush=True)

    yield show


def _metrics(event: Event) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())


def printable(text: str) -> str:
    """A text that is safe for a terminal: control characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
