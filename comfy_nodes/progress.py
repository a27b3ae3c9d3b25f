"""The core's progress as ComfyUI's bar: a monotonically increasing value, previews, and interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from salun.errors import Cancelled
from salun.progress import Event, StageCost
from salun.runs.record import logger

from .images import Preview

PREVIEWS = 20  # most new previews per stage


class ComfyProgress:
    """A `Progress` that checks for ComfyUI's interrupt at every event and raises it as `Cancelled`.

    (The core then saves its state; `computes` turns the exception back into ComfyUI's.)

    Args:
        stages: The stages whose steps the bar counts, in order.
        preview: Makes a preview, at most `PREVIEWS` times per stage; the latest is sent with every step. None for no
            preview.
    """

    def __init__(self, stages: Sequence[StageCost], preview: Callable[[], Preview | None] | None = None) -> None:
        import comfy.utils

        self._stages, self._present = list(stages), 0
        self.total = sum(cost.steps for cost in stages)
        self.preview = preview
        self._sent = 0
        self._image: Preview | None = None
        self._passed = 0, 0  # steps of the present stage before it began again, and since then
        self._bar = comfy.utils.ProgressBar(max(self.total, 1))

    def __call__(self, event: Event, /) -> None:
        from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted

        if event.message:
            logger.info(event.message)
        try:
            throw_exception_if_processing_interrupted()
            self._show(event)
        except InterruptProcessingException as interrupt:
            raise Cancelled("interrupted") from interrupt

    def _show(self, event: Event) -> None:
        following = range(self._present, len(self._stages))
        number = next((i for i in following if self._stages[i].stage is event.stage), None)
        if number is None or not event.step:
            return
        if number != self._present:
            self._present, self._passed = number, (0, 0)
        earlier, last = self._passed
        if event.step < last:  # the stage begins again, as saliency does for each concept
            earlier += last
        self._passed = earlier, event.step
        steps, done = self._stages[number].steps, earlier + event.step
        if self._stages[number].most:  # a training towards a goal: by the step at which it may end, as it sees it now
            done = steps * event.step // max(event.total, event.step)
        value = sum(cost.steps for cost in self._stages[:number]) + min(done, steps)
        if value <= self._sent:
            return
        self._sent = value
        if self.preview is None:
            self._image = None
        elif self._image is None or event.step % max(1, steps // PREVIEWS) == 0:
            self._image = self.preview()
        self._bar.update_absolute(value, self.total, self._image)
