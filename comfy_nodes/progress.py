"""The core's progress as ComfyUI's bar: one rising number, previews, and an interrupt at every event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.errors import Cancelled
from salun.progress import Event
from salun.runs.record import logger

from .inputs import in_inputs_names


class ComfyProgress:
    """A `Progress`. stages: name → how many steps each will tell, in their order; others only look for an interrupt.

    preview: made anew at most `PREVIEWS` times a stage, sent with every step since. ComfyUI's interrupt becomes the
    core's `Cancelled`, upon which the core keeps what it has; `computes` turns it back.
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
        self._passed: dict[str, tuple[int, int]] = {}
        self._bar = comfy.utils.ProgressBar(max(self.total, 1))

    def __call__(self, event: Event, /) -> None:
        from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted

        if event.message:
            logger.info(in_inputs_names(event.message))
        try:
            throw_exception_if_processing_interrupted()
            self._show(event)
        except InterruptProcessingException as interrupt:
            raise Cancelled("interrupted") from interrupt

    def _show(self, event: Event) -> None:
        if event.stage not in self._stages or not event.step:
            return
        earlier, last = self._passed.get(event.stage, (0, 0))
        if event.step < last:  # the stage begins again, such as saliency for the next concept
            earlier += last
        self._passed[event.stage] = earlier, event.step
        value = self._start[event.stage] + min(earlier + event.step, self._stages[event.stage])
        if value <= self._sent:
            return
        self._sent = value
        every = max(1, self._stages[event.stage] // PREVIEWS)
        if self.preview is not None and (self._image is None or event.step % every == 0):
            self._image = self.preview()
        self._bar.update_absolute(value, self.total, self._image)


PREVIEWS = 20  # new pictures in a stage, at most
