"""The story of an erasure: sample, find the salient weights, train those alone, write, compare before with after."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from salun.checkpoints.outputs import check_output
from salun.compute.processes import current
from salun.diffusion.context import _facts, prepared
from salun.diffusion.data.training_set import sample_data
from salun.diffusion.evaluation import compare, observe, questions
from salun.diffusion.losses import ErasureData
from salun.diffusion.masks import _mask_from_file, _mask_of_run, check_given, mask_summary
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.output import erased_tensors, moved
from salun.diffusion.plan import ConceptSpec, Plan, make_plan
from salun.diffusion.result import Run, write_run
from salun.diffusion.targets import check_output_paths, disk_needed, other_input_paths
from salun.diffusion.train import _full, train
from salun.display import shown
from salun.errors import ConfigError
from salun.files import check_disk_space
from salun.masking.mask import Mask
from salun.masking.optimizers import check_optimizer
from salun.options import MASKS, EraseOptions
from salun.progress import Event, Progress, Stage
from salun.runs.cache import Cache
from salun.runs.folder import check_folder
from salun.runs.record import RunRecord


def erase(
    model: Model | str,
    concept: ConceptSpec,
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
    check_optimizer(options.optimizer)
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
    check_output_paths(model, outputs or [], folder, other_input_paths(options))
    plan = make_plan(model.settings, model.name, concept, options)
    check_disk_space(
        disk_needed(model, plan, outputs or [], None if begun else folder)
    )  # a run that goes on has its room
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
        progress(Event(Stage.PLANNING, message=note))
    asked = questions(plan, plan.eval_images, plan.options.seed)
    with record.stage(Stage.SAMPLING):
        data = data or sample_data(model, plan, progress, cache=cache)
    record.data["notes"] += data.notes
    with record.stage(Stage.EVALUATING):
        before = observe(model, asked, progress, Stage.IMAGES_BEFORE, cache)
    with record.stage(Stage.SALIENCY):
        if mask is None:
            mask, record.data["mask"] = _mask_of_run(model, data, plan, record, progress)
        else:
            record.data["mask"] = mask_summary(mask, mask.metadata.get("method", "file"), {"warnings": []})
    with record.stage(Stage.TRAINING):
        state = who.share(record.state("training.safetensors"))
        trained = train(model, mask, data, plan, progress, state, who.share(record.fingerprint))
    original = model.original()
    if plan.options.method == "salun-soft":
        mask = moved(original, trained.masters)
        record.data["mask"].update(selected=mask.selected, density=mask.density)
    masters = trained.masters if plan.options.method == "salun" else _full(trained, mask)
    erased, record.data["rounding"] = erased_tensors(original, mask, masters)
    model.load(erased)
    with record.stage(Stage.EVALUATING):
        after = observe(model, asked, progress, Stage.IMAGES_AFTER)
        metrics = compare(model, plan, asked, before, after)
    return Run(model, plan, mask, erased, trained.history, metrics, asked, before, after, record)
