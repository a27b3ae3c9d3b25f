"""The story of an erasure: sample, find the salient weights, train those alone, write, compare before with after."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from salun import __version__
from salun.cache import Cache
from salun.device import is_out_of_memory, kernels
from salun.diffusion.data import sample_data
from salun.diffusion.denoiser import DiffusionModel
from salun.diffusion.images import folder_digest
from salun.diffusion.loading import load_with
from salun.diffusion.losses import ErasureData, draw, frozen_predictions, saliency_losses, training_losses
from salun.diffusion.models import Model, scoped
from salun.diffusion.observe import compare, observe, questions
from salun.diffusion.output import check_output, check_places, disk_needed, erased_tensors, moved, read_beside
from salun.diffusion.plan import Plan, Wanted, make_plan
from salun.diffusion.result import Run, write_run
from salun.display import shown
from salun.errors import ConfigError, MaskError, ModelError, TrainingError
from salun.formats.tensorfile import sha256_file
from salun.mask import Mask, entries
from salun.options import MASKS, EraseOptions
from salun.processes import current
from salun.progress import Event, Progress, silent
from salun.run_record import RunRecord, check_folder, check_room
from salun.saliency import scores_from_losses
from salun.threshold import select_largest
from salun.training import Trained, TrainingSettings, check_optimiser, fine_tune, saved_steps
from salun.user_text import as_spelled


def erase(
    model: Model | str,
    concept: Wanted,
    options: EraseOptions | None = None,
    *,
    progress: Progress | None = None,
    run_dir: Path | str | None = None,
    outputs: list[str] | None = None,
    force: bool = False,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.erase",
    **given: Any,
) -> Run:
    """Make a model forget a concept, or several at once (SalUn, algorithm 2), and say what came of it.

    model: loaded, or a name for `load`. concept: a `Concept` or its name, or a list of them. given: fields of
    `EraseOptions`, over `options`. run_dir: keeps the run's folder there. outputs: files to write, format by name (see
    `write_output`); with a run_dir and no outputs, the folder gets the model in its own layout and the sparse delta.
    force: overwrite outputs that are there. progress: by default bars on a terminal and in a notebook, and nothing
    elsewhere; `salun.silent` for none. resume: go on with the unfinished run of these options in run_dir, to the
    same bytes as if it had never stopped; where there is none, begin. cache: of sampled latents, the user's by default.
    The model passed in holds its own weights again afterwards. Raises SalunError (ConfigError, ModelError, MaskError,
    …), `Cancelled` if `progress` does.
    """
    options = EraseOptions(**{**asdict(options or EraseOptions()), **given})
    check_optimiser(options.optimiser)
    who = current()
    folder = Path(run_dir).expanduser() if run_dir is not None else None
    outputs = [os.path.expanduser(target) for target in outputs] if outputs is not None else None
    if resume and folder is None:
        raise ConfigError("--resume needs the --run-dir of the run to go on with")
    previous = who.share(check_folder(folder, resume) if folder is not None and not who.rank else None)
    begun = previous is not None
    for target in outputs or []:
        check_output(target, force or begun)
    cache = cache or Cache.of_user()
    if isinstance(model, str):
        model = load_with(model, options)
    check_places(model, outputs or [], folder, read_beside(options))
    plan = make_plan(model.settings, model.name, concept, options)
    check_room(disk_needed(model, plan, outputs or [], None if begun else folder))  # a run that goes on has its room
    if options.method == "salun" and options.mask not in MASKS:
        _mask_from_file(model, plan)  # a mask that does not fit is told now, not after the sampling
    if plan.batch_size % who.count:
        raise ConfigError(f"--batch-size {plan.batch_size} cannot be shared by {who.count} processes: take a multiple")
    place = folder if not who.rank else None  # the first process writes
    record = record_of(model, plan, outputs or [], place, resume, command)
    with shown(progress, quiet=who.rank > 0) as progress, record.running(), prepared(model, plan):
        run = carry_out(model, plan, record, progress, cache)
        if not who.rank:
            write_run(run, outputs, force, progress)
    return run


def record_of(
    model: Model, plan: Plan, outputs: list[str], folder: Path | None, resume: bool = False, command: str = ""
) -> RunRecord:
    """The record of an erasure that is about to begin; nothing is written yet."""
    named = {"model": model.name, "concept": [c.name for c in plan.concepts], "output": outputs}
    options = {**named, **asdict(plan.options)}
    return RunRecord(folder, command, options, plan.options.seed, str(model.device), _facts(model, plan), resume)


@contextmanager
def prepared(model: DiffusionModel, plan: Plan) -> Iterator[None]:
    """Within, the model is lent and set up as the plan says, and running out of memory says what to try."""
    with model.borrowed(), model.set_up(plan.options), kernels(plan.options.deterministic), enough_memory(plan):
        yield


def carry_out(
    model: DiffusionModel,
    plan: Plan,
    record: RunRecord,
    progress: Progress,
    cache: Cache | None = None,
    data: ErasureData | None = None,
    mask: Mask | None = None,
) -> Run:
    """The erasure itself, on a model that is `prepared`; writes nothing but the state to resume from.

    data, mask: where they are there already; a mask must fit the model (MaskError), and the method (ConfigError).
    """
    who = current()
    if mask is not None:
        check_given(mask, model, plan)
    for note in plan.notes:
        progress(Event("planning", message=note))
    asked = questions(plan, plan.eval_images, plan.options.seed)
    with record.stage("sampling"):
        data = data or sample_data(model, plan, progress, cache=cache)
    record.data["notes"] += data.notes
    with record.stage("evaluating"):
        before = observe(model, asked, progress, "pictures before", cache)
    with record.stage("saliency"):
        if mask is None:
            mask, record.data["mask"] = _mask_of_run(model, data, plan, record, progress)
        else:
            record.data["mask"] = _told_of(mask, mask.metadata.get("method", "file"), {"warnings": []})
    with record.stage("training"):
        state = who.share(record.state("training.safetensors"))
        trained = train(model, mask, data, plan, progress, state, who.share(record.fingerprint))
    original = model.original()
    if plan.options.method == "salun-soft":
        mask = moved(original, trained.masters)
        record.data["mask"].update(selected=mask.selected, density=mask.density)
    masters = trained.masters if plan.options.method == "salun" else _full(trained, mask)
    erased, record.data["rounding"] = erased_tensors(original, mask, masters)
    model.load(erased)
    with record.stage("evaluating"):
        after = observe(model, asked, progress, "pictures after")
        metrics = compare(model, plan, asked, before, after)
    return Run(model, plan, mask, erased, trained.history, metrics, asked, before, after, record)


@contextmanager
def enough_memory(plan: Plan) -> Iterator[None]:
    """Turns running out of memory into a TrainingError that says what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"--batch-size {plan.batch_size // 2}, " if plan.batch_size > 1 else ""
        also = "" if plan.options.low_vram else "--low-vram, "
        raise TrainingError(
            f"out of memory with --batch-size {plan.batch_size}: try {smaller}{also}"
            "--dtype bf16, or a smaller --resolution"
        ) from error


def _facts(model: Model, plan: Plan) -> dict[str, str]:
    """What the result depends on beside the options and the versions."""
    facts = {
        "model": model.base_hash,
        "parts": model.parts_hash,
        "prompts": plan.prompts.digest,
        "sampling": repr((model.settings.sampling, plan.saliency_timesteps)),
        "processes": str(current().count),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "none",
    }
    for name in ("forget_images", "retain_images"):
        folder = getattr(plan.options, name)
        if folder is not None:
            facts[name] = folder_digest(as_spelled(Path(folder).expanduser()))
    if plan.options.components is not None:
        facts["components"] = model.parts_hash
    if plan.options.method == "salun" and plan.options.mask not in MASKS:
        facts["mask"] = sha256_file(as_spelled(Path(plan.options.mask).expanduser()))
    return facts


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
            progress(Event("saliency", message=f"the mask is not kept for a resumption: {error}"))
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
    concept: Wanted,
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
    parameters = scoped(model.parameters(), options.scope)
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
        mask, told = _salient(model, data, plan, parameters, progress)
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
    return mask, _told_of(mask, mode, told)


def _told_of(mask: Mask, mode: str, told: Mapping[str, Any]) -> dict[str, Any]:
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
    mask.validate(scoped(model.parameters(), plan.options.scope), model.name)
    if mask.metadata.get("base_hash", origin) != origin:
        raise MaskError(
            f"the mask {what} was made from another model (its hash {mask.metadata['base_hash'][:12]}…, "
            f"this model's {origin[:12]}…): make one with `salun mask --model {model.name}`"
        )

    if not mask.selected:
        raise MaskError(f"the mask {what} selects no weight: nothing could be trained")


def _salient(
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
    done = who.share(len(saved_steps(state, fingerprint, plan.steps)) if state is not None else 0)
    if done:
        progress(Event("training", done, plan.steps, message=f"going on after step {done}"))
    frozen = {}
    for step in range(done, plan.steps if plan.needs_frozen else done):
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        frozen[step] = frozen_predictions(model, sample).cpu()
        progress(Event("frozen targets", step + 1, plan.steps))

    def losses(step: int) -> Any:
        sample = draw(model, data, plan.batch_size, plan.anchor_share, options.seed, step).share(who.rank, who.count)
        held = frozen[step].to(model.device) if frozen else None
        frozen.pop(step - 1, None)  # the last one stays, should its step be taken again
        return training_losses(model, sample, held, plan.target, plan.retain_target)

    soft = options.density if options.method == "salun-soft" else None
    settings = TrainingSettings(
        plan.steps, plan.lr, plan.retain_weight, soft, plan.lr_decay, options.save_every, fingerprint, options.optimiser
    )
    parameters = scoped(model.parameters(), options.scope)
    return fine_tune(parameters, mask, losses, settings, progress, model.original(), state, True, who, options.low_vram)


def _full(trained: Trained, mask: Mask) -> dict[str, Any]:
    """Of masters for every entry, those the mask selects."""
    return {
        name: m[mask.dense(name).view(-1).to(m.device)] for name, m in trained.masters.items() if mask.bits[name].any()
    }
