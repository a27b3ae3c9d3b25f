"""The events of an erasure that is interrupted and resumed, for tests of the time left.

`python -m tools.record_events` writes `tests/recorded_events.json`. Its clock is the processor time of one thread, so
that other programs do not count.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

import salun
from salun.progress import Stage
from salun.runs.cache import Cache

TARGET = Path(__file__).parents[1] / "tests" / "recorded_events.json"
STOPPED = 12  # training step after which the run is interrupted
OPTIONS: dict[str, Any] = {
    "detector": "self", "until": "ua>=0.9", "steps": 30, "forget_latents": 16, "retain_latents": 24, "eval_images": 16,
    "sampling_steps": 6,
}  # fmt: skip


class Recorder:
    """A progress that keeps the events. stop: the training step at which it interrupts the run; 0 for none."""

    def __init__(self, stop: int = 0) -> None:
        self.stages: list[list[Any]] = []
        self.events: list[list[Any]] = []
        self.stop, self.resumed, self._began = stop, False, time.process_time()

    @property
    def seconds(self) -> float:
        """Since the stages were announced."""
        return round(time.process_time() - self._began, 3)

    def __call__(self, event: salun.Event, /) -> None:
        if event.stages:
            self.stages = [list(astuple(cost)) for cost in event.stages]
            self.resumed, self._began = event.resumed, time.process_time()
        elif not event.message:
            shown = [str(event.stage), event.step, event.total, event.restored]
            if not self.events or self.events[-1][1:] != shown:  # the same again, as at each step of a sampler
                self.events.append([self.seconds, *shown])
        if self.stop and (event.stage, event.step) == (Stage.TRAINING, self.stop):
            raise salun.Cancelled("stopped")

    def as_json(self) -> dict[str, Any]:
        """All of it, and the seconds of the whole."""
        return {"stages": self.stages, "resumed": self.resumed, "seconds": self.seconds, "events": self.events}


def main() -> None:
    """Record a run without interruption, and one that is resumed."""
    torch.set_num_threads(1)
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, stop in (("begun", 0), ("stopped", STOPPED), ("resumed", 0)):
            run = "whole" if name == "begun" else "interrupted"
            recorder, cache = Recorder(stop), Cache(Path(folder) / f"cache of {run}")
            try:
                salun.erase("shapes", "circle", run_dir=Path(folder) / run, resume=name == "resumed", cache=cache,
                            progress=recorder, **OPTIONS)  # fmt: skip
            except salun.Cancelled:
                continue
            recorded[name] = recorder.as_json()
    lines = [f'"{name}": {json.dumps(run)}' for name, run in recorded.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
