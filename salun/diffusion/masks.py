"""The mask of a run: saliency (SalUn, eq. 3 and 4), a control, or a file; saved so that a run can resume with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from salun.compute.processes import current_processes
from salun.diffusion.context import RunContext, training_session
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.losses import ErasureData, retain_saliency_losses, saliency_losses
from salun.diffusion.mask_files import check_mask, load_mask_file
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import ConceptSpec, Plan, make_plan, spread
from salun.diffusion.stages import mask_stages
from salun.diffusion.task import FP16_LOSS_SCALE
from salun.errors import ModelError
from salun.masking import find
from salun.masking.find import RunMask
from salun.masking.mask import Mask
from salun.masking.saliency import scores_from_losses, sensitivity_ratio
from salun.progress import Event, Progress, Stage, in_parts, silent
from salun.runs.cache import Cache


def mask_of_run(context: RunContext, data: ErasureData | None, given: Mask | None = None) -> RunMask:
    """The run's mask: given by a host, saved by the run that is resumed, or computed now and saved."""
    if given is not None:
        return RunMask(given, given.metadata.get("method", "file"))
    record = context.record
    path = record.state("mask.safetensors")
    loaded = _saved_mask(path, record.fingerprint) if path is not None and path.exists() else None
    saved: RunMask | None = context.processes.broadcast(loaded)
    if saved is not None:
        check_mask(saved.mask, context.model, context.plan, str(path))
        return saved
    result = find_mask(context.model, data, context.plan, context.progress, context.mask_file)
    if path is not None:
        extra = {"summary": json.dumps(result.summary()), "fingerprint": record.fingerprint}
        try:
            Mask(result.mask.bits, result.mask.shapes, {**result.mask.metadata, **extra}).save(path)
        except ModelError as error:  # a full disk does not stop the run, but it cannot be resumed then
            context.progress(Event(Stage.SALIENCY, message=f"the mask could not be saved to resume from: {error}"))
    return result


def _saved_mask(path: Path, fingerprint: str) -> RunMask | None:
    """The mask that a run of this fingerprint saved, which may be untrusted input; None if it is not valid."""
    mask = Mask.load(path)
    summary = _read_summary(mask.metadata.pop("summary", ""))
    if mask.metadata.pop("fingerprint", None) != fingerprint or not summary:
        return None
    known = {name: summary[name] for name in ("mode", "threshold", "zeros", "ties") if name in summary}
    return RunMask(mask, **known, warnings=tuple(summary["warnings"]))


def _read_summary(text: str) -> dict[str, Any]:
    """A mask's `summary` from untrusted input; empty if it is not valid."""
    numbers = ("density", "selected", "total", "threshold", "zeros", "ties")
    try:
        summary = json.loads(text)
        warnings = summary["warnings"]
        valid = isinstance(summary["mode"], str) and set(summary) <= {"mode", "warnings", *numbers}
        valid &= all(type(v) in (int, float) and math.isfinite(v) for k, v in summary.items() if k in numbers)
        valid &= isinstance(warnings, list) and all(isinstance(each, str) for each in warnings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    return dict(summary) if valid and {"density", "selected", "total"} <= set(summary) else {}


def make_mask(
    model: Model,
    concept: ConceptSpec,
    options: EraseOptions | None = None,
    progress: Progress = silent,
    cache: Cache | None = None,
) -> RunMask:
    """Only the mask of an erasure. cache: of sampled latents, shared with `erase`."""
    plan = make_plan(model.settings, model.name, concept, options or EraseOptions())
    progress(Event(Stage.PLANNING, stages=mask_stages(plan)))
    with training_session(model, plan):
        data = None
        if plan.by_saliency:
            data = build_training_set(
                model, plan, progress, "all" if plan.by_ratio else "forget", cache or Cache.of_user()
            )
        return find_mask(model, data, plan, progress, load_mask_file(model, plan) if plan.mask_is_file else None)


def find_mask(
    model: DiffusionModel,
    data: ErasureData | None,
    plan: Plan,
    progress: Progress = silent,
    mask_file: Mask | None = None,
) -> RunMask:
    """The mask that the plan asks for: by saliency, a control, a file, or all weights for methods that use none.

    Args:
        data: The training set; may be None where the mask is not `plan.by_saliency`.
        mask_file: The file's mask, where the plan names one.
    """
    if mask_file is not None:
        return RunMask(mask_file, "file")
    options = plan.options
    parameters = parameters_in_scope(model, plan.scope)
    mode = options.mask or ("soft" if plan.method.mask == "learned" else "full")

    def scores() -> Iterator[Mapping[str, Tensor]]:
        assert data is not None
        return _saliency_scores(model, data, plan, parameters, progress)

    metadata = {
        "scope": plan.scope,
        "base_hash": model.base_hash,
        "concept": plan.name,
        "combine": options.combine,
        "seed": str(options.seed),
    }
    return find.find_mask(parameters, mode, options.density, options.seed, scores, metadata)


def _saliency_scores(
    model: DiffusionModel, data: ErasureData, plan: Plan, parameters: Mapping[str, Parameter], progress: Progress
) -> Iterator[Mapping[str, Tensor]]:
    """Saliency scores (SalUn, eq. 3) of all concepts together, or, for a union of masks, of each concept by itself.

    For `saliency-ratio` relative to those of as many retain samples.
    """
    processes, recipe, seed = current_processes(), plan.recipe, plan.options.seed
    n = len(data.forget) // len(plan.concepts)
    union = plan.options.combine == "union" and len(plan.concepts) > 1
    for rows in [slice(i * n, (i + 1) * n) for i in range(len(plan.concepts))] if union else [slice(None)]:
        part = data.forgetting(rows)
        how = (recipe.batch_size, recipe.saliency_timesteps, seed, processes)
        batches = recipe.saliency_timesteps * math.ceil(len(part.forget) / recipe.batch_size)
        total = math.ceil(batches / processes.count)
        scale = FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
        first, second = in_parts(progress, [total, total if plan.by_ratio else 0])
        losses = saliency_losses(model, part, recipe.guidance, *how)
        scores = scores_from_losses(parameters, losses, first, total, processes, plan.options.low_vram, scale)
        if plan.by_ratio:
            picked = spread(len(part.forget), len(data.retain), seed + 2)
            losses = retain_saliency_losses(model, data, picked, *how)
            retain = scores_from_losses(parameters, losses, second, total, processes, plan.options.low_vram, scale)
            scores = sensitivity_ratio(scores, retain)
        yield scores
