"""The connection of a job's child process to its parent: events as JSON lines, progress, the request to stop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from salun.errors import Cancelled, SalunError
from salun.progress import Event, Progress, Stage
from salun.time_left import TimeLeft

from .messages import to_fields

EVERY = 0.2  # seconds between two events on the steps of one stage


class ParentPipe:
    """The connection to the parent: events go out by `send`, its request to stop comes in as `stopping`."""

    def __init__(self, out: TextIO, inlet: TextIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self.stopping = threading.Event()
        threading.Thread(target=self._listen, args=(inlet,), daemon=True).start()

    def _listen(self, inlet: TextIO) -> None:
        inlet.readline()  # a line, or the end: both mean stop
        self.stopping.set()

    def send(self, event: str, **fields: Any) -> None:
        text = json.dumps({"event": event, **fields}, ensure_ascii=True)
        try:
            with self._lock:
                self._out.write(text + "\n")
                self._out.flush()
        except OSError:  # the parent is gone: training is saved, as when it asks to stop
            self.stopping.set()

    def send_loading(self) -> None:
        """Tell that the model is being loaded, of which no step is known."""
        self.send("stage", stage=Stage.LOADING, step=0, total=0, fraction=0.0, left=None, metrics={})

    def send_error(self, error: SalunError) -> None:
        self.send("error", error=to_fields(error))

    def check(self) -> None:
        """Raises Cancelled once the parent wants to stop."""
        if self.stopping.is_set():
            self.send("stopping")
            raise Cancelled("stopped")


def pipe_progress(pipe: ParentPipe, each: Callable[[Event], None] = lambda event: None) -> Progress:
    """A progress that reports to the parent. each: called on every event as well, before it is reported."""
    timed, stage, sent = TimeLeft(), "", 0.0
    step = total = 0

    def progress(event: Event, /) -> None:
        nonlocal stage, step, total, sent
        pipe.check()
        each(event)
        position, now = timed.at(event), time.monotonic()
        if event.message and not (event.stage == Stage.SAVING and event.total):  # the names of files are in the result
            pipe.send("message", text=event.message)
        if event.message and not event.total:  # a note begins no stage
            return
        if event.total or event.stage != stage:
            step, total = event.step, event.total
        if event.stage != stage or now - sent >= EVERY or event.step == event.total > 0:
            stage, sent = event.stage, now
            pipe.send(
                "stage",
                stage=stage,
                step=step,
                total=total,
                fraction=round(position.fraction, 4),
                left=None if position.left is None else [round(seconds, 1) for seconds in position.left],
                metrics={name: float(value) for name, value in event.metrics.items()},
            )

    return progress
