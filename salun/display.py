"""The default display of progress: one bar on terminals and in notebooks, lines elsewhere, none by `salun.silent`."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TextIO

from salun.progress import Event, Progress, Stage, silent
from salun.time_left import Position, TimeLeft, in_words

COLUMNS, WIDE = 79, 110  # of a bar; of a terminal that has room for losses next to it
LABEL, LEFT = 30, 24  # columns of the label and of the time left
EVERY = 0.1  # seconds between two updates of a bar
PARTS = 1000  # of a bar
LABELS = {
    Stage.PLANNING: "Planning",
    Stage.LOADING: "Loading the model",
    Stage.MEASURING: "Measuring this machine",
    Stage.CHECKING: "Checking the model",
    Stage.COMPARING: "Comparing",
    Stage.SAMPLING: "Sampling",
    Stage.ENCODING: "Encoding images",
    Stage.IMAGES_BEFORE: "Sampling images before",
    Stage.IMAGES_AFTER: "Sampling images after",
    Stage.CALIBRATING: "Calibrating the detector",
    Stage.PROBING: "Probing",
    Stage.DETECTING: "Detecting the concept",
    Stage.EVALUATING: "Evaluating",
    Stage.SALIENCY: "Finding salient weights",
    Stage.FROZEN_TARGETS: "Computing targets",
    Stage.TRAINING: "Training",
    Stage.ORIGINAL: "Training the original",
    Stage.UNLEARNING: "Unlearning",
    Stage.RETRAINING: "Retraining",
    Stage.RELEARNING: "Relearning",
    Stage.CURVATURE: "Computing curvature",
    Stage.SEARCHING: "Searching",
    Stage.ATTACKING: "Attacking",
    Stage.SAVING: "Saving",
    Stage.WRITING: "Writing",
    Stage.EXPORTING: "Exporting",
    Stage.STOPPING: "Stopping",
}


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
    if _in_notebook() or (sys.stderr is not None and sys.stderr.isatty()):
        return bar
    return (lambda: lines(sys.stderr)) if sys.stderr is not None else _nothing


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code. IPython on a terminal counts as a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or type(shell).__module__.startswith("google.colab")


@contextmanager
def _nothing() -> Iterator[Progress]:
    yield silent


@contextmanager
def bar() -> Iterator[Progress]:
    """One bar for the whole run, with its stage and the time left; messages above it."""
    notebook = _in_notebook()
    if notebook:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    without_thread = type("Bar", (tqdm,), {"monitor_interval": 0})  # which would watch over the bar
    with _Bar(without_thread, None if notebook else _bar_columns()) as drawn:
        yield drawn


def columns() -> int:
    """Columns of text and bars: 79, or fewer on a narrow terminal."""
    return min(shutil.get_terminal_size((COLUMNS + 1, 24)).columns - 1, COLUMNS)


def _bar_columns() -> int:
    """Columns of a bar, which has losses next to it on a wide terminal."""
    return WIDE if shutil.get_terminal_size((COLUMNS + 1, 24)).columns > WIDE else columns()


class _Bar:
    """A `Progress` that draws one bar.

    Args:
        tqdm: The class of the bar.
        columns: Its width; None in a notebook, which chooses it.
    """

    def __init__(self, tqdm: Any, columns: int | None) -> None:
        self._tqdm, self._columns = tqdm, columns
        self._stream = sys.stdout if columns is None else sys.stderr
        self._bar: Any = None
        self._time, self._stage, self._drawn = TimeLeft(), "", 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):  # the terminal is closed
                self._bar.close()

    def __call__(self, event: Event, /) -> None:
        position = self._time.at(event)
        for line in wrapped(event.message, columns()) if event.message else ():
            self._write(line)
        now = time.monotonic()
        due = now - self._drawn >= EVERY or event.stage != self._stage or (event.step == event.total > 0)
        if due and not event.stages and (event.total or not event.message):
            self._stage, self._drawn = event.stage, now
            self._draw(event, position)

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(line, file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def _draw(self, event: Event, position: Position) -> None:
        label, left = _label(event, position), in_words(position.left)
        losses = f"  {_metrics(event)}"[: WIDE - COLUMNS] if self._columns in (WIDE, None) else ""
        layout = f"{_escaped(f'{label:<{LABEL}}')} {{percentage:3.0f}}% {{bar}} {_escaped(f'{left:<{LEFT}}{losses}')}"
        if self._bar is None:
            self._bar = self._tqdm(
                total=PARTS, bar_format=layout, ncols=self._columns, nrows=24, leave=False, file=sys.stderr
            )
        self._bar.bar_format, self._bar.n = layout, round(PARTS * position.fraction)
        self._bar.refresh()


def _escaped(text: str) -> str:
    """A text to put into a format as it is."""
    return text.replace("{", "{{").replace("}", "}}")


@contextmanager
def lines(stream: TextIO) -> Iterator[Progress]:
    """A line for each message and for each tenth of a stage."""
    timed, last = TimeLeft(), dict[str, int]()

    def show(event: Event, /) -> None:
        position = timed.at(event)
        if event.message:
            print(printable(event.message), file=stream, flush=True)
        if event.total:
            tenth = 10 * event.step // event.total
            if event.step == 1 or tenth != last.get(event.stage, -1):
                last[event.stage] = tenth
                left = in_words(position.left) if event.step < event.total else ""
                parts = [f"{_label(event, position)}: {event.step}/{event.total}", _metrics(event), left]
                print("  ".join(filter(None, parts)), file=stream, flush=True)

    yield show


def _label(event: Event, position: Position) -> str:
    """The stage in words, with its number where all are known."""
    label = LABELS.get(event.stage, str(event.stage))
    return f"{position.number}/{position.count} {label}" if position.number else label


def _metrics(event: Event) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())


def wrapped(text: str, columns: int) -> list[str]:
    """A text in lines of a terminal; a path is never broken."""
    return textwrap.wrap(printable(text), columns, break_long_words=False, break_on_hyphens=False) or [""]


def printable(text: str) -> str:
    """A text that is safe for a terminal: control characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
