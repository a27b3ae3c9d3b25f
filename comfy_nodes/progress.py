"""The core's progress as ComfyUI's bar: one rising number, previews, and an interrupt at every event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.progress import Event


class Bar:
    """A `Progress`. stages: name → how many steps each will tell, in their order; others only look for an interrupt.

    preview: made anew at most `PREVIEWS` times a stage, sent with every step since.
    """

    def __init__(self, stages: Mapping[str, int], preview: Any = None) -> None:
        import comfy.utils

        self.total = sum(stages.values())
        self._stages, self._start = dict(stages), {}
        done = 0
        for name, steps in stages.items():
            self._start[name] = done
            done += steps
        self._sent, self.preview, self._image = 0, preview, None
        self._bar = comfy.utils.ProgressBar(max(self.total, 1))

    def __call__(self, event: Event, /) -> None:
        from comfy.model_management import throw_exception_if_processing_interrupted

        throw_exception_if_processing_interrupted()
        if event.stage not in self._stages or not event.step:
            return
        value = self._start[event.stage] + min(event.step, self._stages[event.stage])
        if value <= self._sent:
            return
        self._sent = value
        every = max(1, self._stages[event.stage] // PREVIEWS)
        if self.preview is not None and (self._image is None or event.step % every == 0):
            self._image = self.preview()
        self._bar.update_absolute(value, self.total, self._image)


PREVIEWS = 20  # new pictures in a stage, at most
