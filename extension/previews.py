"""Previews of an erasure: images of the same prompts and seeds before and during the training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun.progress import Event, Stage

from .parent_pipe import ParentPipe

if TYPE_CHECKING:
    from salun.diffusion.model.stable_diffusion import Model
    from salun.diffusion.plan import Plan

PREVIEWS = 3  # forget prompts of a preview; one retain prompt is shown with them


class Previews:
    """Images of the same prompts and seeds before training and after every n steps of it (n = 0: none)."""

    def __init__(self, model: Model, plan: Plan, every: int, pipe: ParentPipe, folder: Path) -> None:
        from salun.diffusion.evaluation import eval_prompts

        self.model, self.plan, self.every, self.pipe, self.folder = model, plan, every, pipe, folder
        prompts = eval_prompts(plan, PREVIEWS, plan.options.seed)
        self.prompts = [*prompts.forget[:PREVIEWS], *prompts.retain[:1]]
        self.seeds = [*prompts.forget_seeds[:PREVIEWS], *prompts.retain_seeds[:1]]
        self.blur = any(c.sensitive for c in plan.concepts) and not plan.options.show_sensitive
        self.before: Any = None

    def __call__(self, event: Event) -> None:
        if not self.every or not event.total or not self.prompts:
            return
        if self.before is None and event.stage in (Stage.SALIENCY, Stage.FROZEN_TARGETS):  # still the original model
            self.before = self._images()
        due = event.step % self.every == 0 and event.step < event.total
        if event.stage == Stage.TRAINING and due and not event.message and self.before is not None:
            self._send(event.step)

    def _images(self) -> Any:
        import torch

        from salun.diffusion.data.latents import sample_images

        with torch.no_grad():
            return sample_images(self.model, [p.text for p in self.prompts], self.seeds, self._check)

    def _check(self, event: Event, /) -> None:
        self.pipe.check()

    def _send(self, step: int) -> None:
        from salun.files import write_bytes
        from salun.report import image_grid

        after, n = self._images(), len(self.prompts) - 1
        texts = [p.text for p in self.prompts]
        forget = image_grid.grid(self.before[:n], after[:n], texts[:n], blur=self.blur)
        retain = image_grid.grid(self.before[n:], after[n:], texts[n:])
        name = f"preview-{step:06d}.png"
        write_bytes(self.folder / name, image_grid.png_bytes(image_grid.stack(forget, retain)))
        self.pipe.send("preview", file=name, step=step)
