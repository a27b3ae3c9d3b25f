"""Masked fine-tuning of a diffusion model (SalUn eq. 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salun.compute.processes import current
from salun.diffusion.losses import ErasureData, draw, frozen_predictions, training_losses
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.plan import Plan
from salun.masking.mask import Mask
from salun.masking.training import Trained, TrainingSettings, fine_tune, read_saved_history
from salun.progress import Event, Progress, Stage


def train(
    model: DiffusionModel,
    mask: Mask,
    data: ErasureData,
    plan: Plan,
    progress: Progress,
    state: Path | None = None,
    fingerprint: str = "",
) -> Trained:
    """Masked fine-tuning. Frozen targets are computed for all steps beforehand, so that no second UNet is held.

    state: where training is saved and, if this run (by its fingerprint) has stopped before, taken up from.
    """
    options, who = plan.options, current()
    done = who.share(len(read_saved_history(state, fingerprint, plan.steps)) if state is not None else 0)
    if done:
        progress(Event(Stage.TRAINING, done, plan.steps, message=f"going on after step {done}"))
    frozen = {}
    for step in range(done, plan.steps if plan.needs_frozen else done):
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        frozen[step] = frozen_predictions(model, sample).cpu()
        progress(Event(Stage.FROZEN_TARGETS, step + 1, plan.steps))

    def losses(step: int) -> Any:
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        held = frozen[step].to(model.device) if frozen else None
        frozen.pop(step - 1, None)  # the last one stays, should its step be taken again
        return training_losses(model, sample, held, plan.target, plan.retain_target)

    soft = options.density if options.method == "salun-soft" else None
    settings = TrainingSettings(
        plan.steps, plan.lr, plan.retain_weight, soft, plan.lr_decay, options.save_every, fingerprint, options.optimizer
    )
    parameters = parameters_in_scope(model, options.scope)
    return fine_tune(parameters, mask, losses, settings, progress, model.original(), state, True, who, options.low_vram)


def _full(trained: Trained, mask: Mask) -> dict[str, Any]:
    """Of masters for every entry, those the mask selects."""
    return {
        name: m[mask.dense(name).view(-1).to(m.device)] for name, m in trained.masters.items() if mask.bits[name].any()
    }
