"""The context of a run: all checks before the first sample, and the configured model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from salun.checkpoints.outputs import check_output
from salun.compute.device import deterministic_kernels, explained_memory_errors
from salun.compute.processes import Processes, current_processes
from salun.diffusion.data.images import folder_digest
from salun.diffusion.fit import Fit, fit, fitted_plan
from salun.diffusion.mask_files import load_mask_file
from salun.diffusion.model.loading import describe, load_with
from salun.diffusion.model.protocol import DiffusionModel, TextAttention, TokenEncoder
from salun.diffusion.model.settings import display_name
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions, ModelOptions
from salun.diffusion.plan import ConceptSpec, Plan
from salun.diffusion.stages import erasure_stages
from salun.diffusion.targets import check_output_paths, disk_needed, other_input_paths
from salun.display import shown
from salun.errors import ConfigError
from salun.files import check_disk_space, sha256_file
from salun.masking.mask import Mask
from salun.masking.optimizers import check_optimizer
from salun.methods import load
from salun.progress import Event, Progress, Stage, StageCost, silent
from salun.runs.cache import Cache
from salun.runs.folder import check_folder
from salun.runs.record import RunRecord
from salun.user_text import as_spelled

logger = logging.getLogger("salun")


@dataclass
class RunContext:
    """One run and what it uses. The model is in a `training_session`.

    Args:
        outputs: Files and folders to write, format by name; None for the run folder's own.
        mask_file: The mask that the options name, loaded and checked; None where they name none.
        resumed: Whether an unfinished run continues.
    """

    model: DiffusionModel
    plan: Plan
    record: RunRecord
    progress: Progress = silent
    cache: Cache | None = None
    outputs: list[str] | None = None
    force: bool = False
    mask_file: Mask | None = None
    resumed: bool = False
    processes: Processes = field(default_factory=current_processes)

    def stage(self, stage: Stage) -> AbstractContextManager[None]:
        """Context manager: time a stage in the record."""
        return self.record.stage(stage)

    def announce(self) -> None:
        """Report what the run will do, and its stages."""
        stages = erasure_stages(self.plan)
        if self.outputs or self.record.folder is not None:
            stages.append(StageCost(Stage.SAVING, max(1, len(self.outputs or [None, None]))))
        summary = self.plan.summary(display_name(self.model.name))
        self.progress(Event(Stage.PLANNING, message=summary, stages=stages, resumed=self.resumed))

    def note(self, stage: Stage, *lines: str) -> None:
        """Add lines to the record's notes, and report them."""
        self.record.notes += lines
        for line in lines:
            self.progress(Event(stage, message=line))


@contextmanager
def open_run(
    model: Model | str,
    concept: ConceptSpec,
    options: EraseOptions,
    *,
    run_dir: Path | str | None = None,
    outputs: list[str] | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    cache: Cache | None = None,
    command: str = "",
) -> Iterator[RunContext]:
    """Context manager: a run that may begin. All checks are made here, before hours of work; arguments as `erase`."""
    check_optimizer(options.optimizer)
    processes = current_processes()
    folder = Path(run_dir).expanduser() if run_dir is not None else None
    outputs = [os.path.expanduser(target) for target in outputs] if outputs is not None else None
    if resume and folder is None:
        raise ConfigError("needs the folder of the run to resume", option="resume", advice="Give it by {run_dir}")
    unfinished = check_folder(folder, resume) if folder is not None and not processes.rank else None
    recorded = processes.broadcast(unfinished["options"] if unfinished is not None else None)
    resumed = recorded is not None
    for target in outputs or []:
        check_output(target, force or resumed)
    if isinstance(model, str):
        model = load_with(model, options)
    check_output_paths(model, outputs or [], folder, other_input_paths(options))
    cache = cache or Cache.of_user()
    if model.device.type == "cuda" and progress is not None:
        progress(Event(Stage.PLANNING, message="simulating what the run needs of memory"))  # takes seconds
    fit_of = partial(_fit, model, options, cache, processes)
    fitted = fitted_plan(model.settings, model.name, concept, options, fit_of, recorded)
    plan = fitted.plan
    check_disk_space(disk_needed(model, plan, outputs or [], None if resumed else folder))  # a resumed run has its own
    mask_file = load_mask_file(model, plan) if plan.mask_is_file else None
    if plan.recipe.batch_size % processes.count:
        raise ConfigError(
            f"is {plan.recipe.batch_size}, but must be divisible by the number of processes ({processes.count})",
            option="batch_size",
        )
    record = record_of(model, plan, outputs or [], folder if not processes.rank else None, resume, command)
    with (
        shown(progress, quiet=processes.rank > 0) as progress,
        record.running(),
        training_session(model, plan),
    ):
        context = RunContext(model, plan, record, progress, cache, outputs, force, mask_file, resumed, processes)
        context.note(Stage.PLANNING, *fitted.notes)
        yield context


def _fit(model: Model, options: EraseOptions, cache: Cache, processes: Processes, plan: Plan) -> Fit:
    """What the plan needs to fit into the GPU's memory; nothing without one, or if it cannot be simulated."""
    if model.device.type != "cuda":
        return Fit({}, "")
    given = ModelOptions(**{item.name: getattr(options, item.name) for item in fields(ModelOptions)})
    weights = sum(p.numel() * p.element_size() for p in model.parameters().values())  # they are there already
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = processes.least(torch.cuda.mem_get_info(model.device)[0] + unused + weights)
    try:
        spec = describe(model.name, given)
        where = free, spec, plan, model.device, model.dtype, cache
        needed = fit(*where, batch_size=options.batch_size, processes=processes.count)
    except Exception:  # of a torch that cannot simulate a kernel, say: no reason to stop a run
        logger.debug("the run's memory could not be simulated", exc_info=True)
        needed = Fit({}, "what it needs could not be simulated")
    agreed: Fit = processes.broadcast(needed)
    return agreed


def record_of(
    model: Model, plan: Plan, outputs: list[str], folder: Path | None, resume: bool = False, command: str = ""
) -> RunRecord:
    """The record of an erasure that is about to begin; nothing is written yet."""
    named = {"model": model.name, "concept": [c.name for c in plan.concepts], "output": outputs}
    options = {**named, **asdict(plan.options)}
    return RunRecord(
        folder, command, options, plan.options.seed, str(model.device), _fingerprint_facts(model, plan), resume
    )


@contextmanager
def training_session(model: DiffusionModel, plan: Plan) -> Iterator[None]:
    """Context manager: configure the model as the plan says; an out-of-memory error says what to try.

    Raises ConfigError for a hardened training of a model that does not show the tokens of its text encoder, for a
    method that needs attention maps of a model that does not show them, and for what the method cannot do.
    """
    if plan.method.attention and not isinstance(model, TextAttention):
        raise ConfigError(
            f"is {plan.method.name}, which needs tokens and attention maps, and this model does not show them",
            option="method",
            advice="Use the command line for it, or {method} esd",
        )
    if plan.options.harden and not isinstance(model, TokenEncoder):
        raise ConfigError(
            "needs the tokens of the text encoder, which this model does not show",
            option="harden",
            advice="Use the command line for it, or set {harden} to 0",
        )
    if plan.method.check:
        load(plan.method.check)(plan, model)
    with (
        model.temporarily_trainable(),
        model.configured(plan.options),
        deterministic_kernels(plan.options.deterministic),
        _memory_errors(plan),
    ):
        yield


def _memory_errors(plan: Plan) -> AbstractContextManager[None]:
    """Context manager: running out of memory says which options to try."""
    batch = plan.recipe.batch_size
    smaller = f"{{batch_size}} {batch // 2}, " if batch > 1 else ""
    low_vram = "" if plan.options.low_vram else "{low_vram}, "
    advice = f"Try {smaller}{low_vram}{{dtype}} bf16, or a smaller {{resolution}}"
    return explained_memory_errors(f"out of memory at batch_size {batch}", advice)


def _fingerprint_facts(model: Model, plan: Plan) -> dict[str, str]:
    """What the result depends on besides the options and the versions."""
    facts = {
        "model": model.base_hash,
        "parts": model.parts_hash,
        "prompts": plan.prompts.digest,
        "sampling": repr((model.settings.sampling, plan.recipe.saliency_timesteps)),
        "processes": str(current_processes().count),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "none",
    }
    for name in ("forget_images", "retain_images"):
        folder = getattr(plan.options, name)
        if folder is not None:
            facts[name] = folder_digest(as_spelled(Path(folder).expanduser()))
    if plan.options.components is not None:
        facts["components"] = model.parts_hash
    if plan.mask_is_file:
        assert plan.options.mask is not None
        facts["mask"] = sha256_file(as_spelled(Path(plan.options.mask).expanduser()))
    return facts
