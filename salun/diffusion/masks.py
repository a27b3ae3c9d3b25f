"""The mask of a run: saliency (SalUn eq. 3 and 4), a control, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from salun.compute.processes import current
from salun.diffusion.context import prepared
from salun.diffusion.data.training_set import sample_data
from salun.diffusion.losses import ErasureData, saliency_losses
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import ConceptSpec, Plan, make_plan
from salun.errors import ConfigError, MaskError, ModelError
from salun.masking.mask import Mask, entries
from salun.masking.saliency import scores_from_losses
from salun.masking.threshold import select_largest
from salun.options import MASKS, EraseOptions
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache
from salun.runs.record import RunRecord
from salun.user_text import as_spelled
from salun.version import __version__


def _mask_of_run(
    model: DiffusionModel, data: ErasureData, plan: Plan, record: RunRecord, progress: Progress
) -> tuple[Mask, dict[str, Any]]:
    """The run's mask, taken up from a run that stopped after it was found, else found and kept."""
    path = record.state("mask.safetensors")
    kept, told = None, {}
    if path is not None and path.exists():
        kept = Mask.load(path)
        told = _read_told(kept.metadata.pop("told", ""))
        if kept.metadata.pop("fingerprint", None) != record.fingerprint or not told:
            kept = None
    kept, told = current().share((kept, told))
    if kept is not None:
        check_mask(kept, model, plan, str(path))
        return kept, told
    mask, told = find_mask(model, data, plan, progress)
    if path is not None:
        extra = {"told": json.dumps(told), "fingerprint": record.fingerprint}
        try:
            Mask(mask.bits, mask.shapes, {**mask.metadata, **extra}).save(path)
        except ModelError as error:  # a full disk costs the means to resume, not the run
            progress(Event(Stage.SALIENCY, message=f"the mask is not kept for a resumption: {error}"))
    return mask, told


def _read_told(text: str) -> dict[str, Any]:
    """What a saved mask, which may be untrusted input, says of how it was found; empty if that is not valid."""
    numbers = ("density", "selected", "total", "threshold", "zeros", "ties")
    try:
        told = json.loads(text)
        warnings = told["warnings"]
        valid = isinstance(told["mode"], str) and set(told) <= {"mode", "warnings", *numbers}
        valid &= all(type(told[name]) in (int, float) and math.isfinite(told[name]) for name in numbers if name in told)
        valid &= isinstance(warnings, list) and all(isinstance(each, str) for each in warnings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    return dict(told) if valid and {"density", "selected", "total"} <= set(told) else {}


def make_mask(
    model: Model,
    concept: ConceptSpec,
    options: EraseOptions | None = None,
    progress: Progress = silent,
    cache: Cache | None = None,
) -> tuple[Mask, dict[str, Any]]:
    """Only the mask of an erasure, and what `run.json` says of it. cache: as in `erase`, which shares its samples."""
    options = options or EraseOptions()
    plan = make_plan(model.settings, model.name, concept, options)
    with prepared(model, plan):
        data = None
        if plan.by_saliency:
            data = sample_data(model, plan, progress, forget_only=True, cache=cache or Cache.of_user())
        return find_mask(model, data, plan, progress)


def find_mask(
    model: DiffusionModel, data: ErasureData | None, plan: Plan, progress: Progress
) -> tuple[Mask, dict[str, Any]]:
    """The mask of a run: from saliency, a control, or a file made from this very model. And what to tell of it.

    data: may be None where the plan's mask is not `by_saliency`.
    """
    options = plan.options
    parameters = parameters_in_scope(model.parameters(), options.scope)
    origin = model.base_hash
    told: dict[str, Any] = {"warnings": []}
    mode = "soft" if options.method == "salun-soft" else options.mask if options.mask in MASKS else "file"
    if mode == "file":
        mask = _mask_from_file(model, plan)
    elif mode in ("soft", "full"):
        mask = Mask.full(parameters)
    elif mode == "random":
        mask = Mask.random(parameters, options.density, options.seed)
    else:
        assert data is not None
        mask, told = _saliency_mask_of(model, data, plan, parameters, progress)
        if mode == "shuffled":
            mask = mask.shuffled(options.seed)
    if mode != "file":
        metadata = {
            "method": mode,
            "density": str(options.density),
            "scope": options.scope,
            "base_hash": origin,
            "concept": plan.name,
            "combine": options.combine,
            "seed": str(options.seed),
            "salun_version": __version__,
        }
        mask = Mask(mask.bits, mask.shapes, metadata)
    return mask, mask_summary(mask, mode, told)


def mask_summary(mask: Mask, mode: str, told: Mapping[str, Any]) -> dict[str, Any]:
    return {"mode": mode, "density": mask.density, "selected": mask.selected, "total": mask.total, **told}


def _mask_from_file(model: DiffusionModel, plan: Plan) -> Mask:
    mask = Mask.load(as_spelled(Path(plan.options.mask).expanduser()))
    check_mask(mask, model, plan, plan.options.mask)
    return mask


def check_given(mask: Mask, model: DiffusionModel, plan: Plan) -> None:
    """For a mask that is there before the run: `check_mask`, and ConfigError for a method that finds its own.

    To be called before hours of sampling, on a model that is `prepared`.
    """
    if plan.options.method == "salun-soft":
        raise ConfigError("--method salun-soft finds its mask while it trains: give it none, or take salun")
    check_mask(mask, model, plan, "given")


def check_mask(mask: Mask, model: DiffusionModel, plan: Plan, what: str) -> None:
    """Raises MaskError for a mask of another scope than the plan's, of other parameters, of another model, or of
    no weight at all.
    """
    scope, origin = mask.metadata.get("scope", "full"), model.base_hash
    if scope != plan.options.scope:
        raise MaskError(f"the mask {what} was made with --scope {scope}: give that, or make another")
    mask.validate(parameters_in_scope(model.parameters(), plan.options.scope), model.name)
    if mask.metadata.get("base_hash", origin) != origin:
        raise MaskError(
            f"the mask {what} was made from another model (its hash {mask.metadata['base_hash'][:12]}…, "
            f"this model's {origin[:12]}…): make one with `salun mask --model {model.name}`",
            code="other-model",
        )

    if not mask.selected:
        raise MaskError(f"the mask {what} selects no weight: nothing could be trained")


def _saliency_mask_of(
    model: DiffusionModel, data: ErasureData, plan: Plan, parameters: Mapping[str, Parameter], progress: Progress
) -> tuple[Mask, dict[str, Any]]:
    """The saliency mask, and what to tell of its threshold.

    joint: one from the gradients of all concepts together. union: each concept's own of this density, then all of them.
    """
    k = entries(sum(p.numel() for p in parameters.values()), plan.options.density)
    n = len(data.forget) // len(plan.concepts)
    several = plan.options.combine == "union" and len(plan.concepts) > 1
    groups = [slice(i * n, (i + 1) * n) for i in range(len(plan.concepts))] if several else [slice(None)]
    mask, told, who = None, [], current()
    for rows in groups:
        part = data.forgetting(rows)
        losses = saliency_losses(
            model, part, plan.guidance, plan.batch_size, plan.saliency_timesteps, plan.options.seed, who
        )
        total = -(-plan.saliency_timesteps * -(-len(part.forget) // plan.batch_size) // who.count)
        scale = 1024.0 if model.dtype == torch.float16 else 1.0
        scores = scores_from_losses(parameters, losses, progress, total, who, plan.options.low_vram, scale)
        selection = select_largest(scores, k)
        own = Mask.from_selection(selection, parameters)
        mask = own if mask is None else mask | own
        told.append(selection)
    assert mask is not None
    return mask, {
        "threshold": min(selection.threshold for selection in told),
        "zeros": max(selection.zeros for selection in told),
        "ties": max(selection.ties for selection in told),
        "warnings": list(dict.fromkeys(text for selection in told for text in selection.warnings())),
    }
