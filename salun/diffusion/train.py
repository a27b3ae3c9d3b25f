"""Masked fine-tuning of a diffusion model (SalUn eq. 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from salun.compute.processes import current
from salun.diffusion.losses import ErasureData, draw, frozen_predictions, training_losses
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.plan import Plan
from salun.masking import training
from salun.masking.mask import Mask
from salun.masking.optimizers import adam
from salun.masking.training_state import StateFile, read_saved_history
from salun.progress import Event, Progress, Stage


def train(
    model: DiffusionModel,
    mask: Mask,
    data: ErasureData,
    plan: Plan,
    progress: Progress,
    state: Path | None = None,
    fingerprint: str = "",
) -> training.Trained:
    """Masked fine-tuning. Frozen targets are computed for all steps beforehand, so that no second UNet is held.

    state: where training is saved and, if this run (by its fingerprint) has stopped before, taken up from.
    """
    options, who = plan.options, current()
    done = who.share(len(read_saved_history(state, fingerprint, plan.steps)) if state is not None else 0)
    if done:
        progress(Event(Stage.TRAINING, done, plan.steps, message=f"resuming after step {done}"))
    frozen = {}
    for step in range(done, plan.steps if plan.needs_frozen else done):
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        frozen[step] = frozen_predictions(model, sample).cpu()
        progress(Event(Stage.FROZEN_TARGETS, step + 1, plan.steps))

    def losses(step: int) -> dict[str, Tensor]:
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        held = frozen[step].to(model.device) if frozen else None
        frozen.pop(step - 1, None)  # the last one stays, should its step be taken again
        forget, retain = training_losses(model, sample, held, plan.target, plan.retain_target)
        return {"forget": forget, "retain": retain}

    parameters = parameters_in_scope(model.parameters(), options.scope)
    settings = training.TrainingSettings(
        plan.steps,
        training.linear_decay(plan.lr, plan.steps, plan.lr_decay),
        adam(options.optimizer, plan.lr, parameters, options.low_vram),
        {"retain": plan.retain_weight},
        options.density if options.method == "salun-soft" else None,
        cpu_offload=options.low_vram,
    )
    file = StateFile(state, fingerprint, options.save_every) if state is not None else None
    return training.train(
        parameters, mask, losses, settings, progress, sources=model.original(), state=file, processes=who
    )


def _full(trained: training.Trained, mask: Mask) -> dict[str, Any]:
    """Of masters for every entry, those the mask selects."""
    return {
        name: m[mask.dense(name).view(-1).to(m.device)] for name, m in trained.masters.items() if mask.bits[name].any()
    }
