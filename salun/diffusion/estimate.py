"""An estimate of an erasure before it begins: its steps, memory, disk space, and time measured on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from salun.checkpoints.outputs import check_output
from salun.compute.device import pick_device, pick_dtype
from salun.compute.environment import free_in_container
from salun.diffusion.context import record_of
from salun.diffusion.fit import Fit, fit, fitted_plan
from salun.diffusion.model.loading import ModelSpec, describe, load_with
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions, ModelOptions
from salun.diffusion.plan import ConceptSpec, Plan
from salun.diffusion.simulate import Needs, operations, simulate
from salun.diffusion.stages import erasure_stages, further_samples
from salun.diffusion.targets import check_output_paths, disk_needed, other_input_paths
from salun.errors import ConfigError
from salun.files import check_disk_space
from salun.masking.saliency import each_gradient
from salun.progress import Event, Progress, Stage, StageCost, silent
from salun.runs.cache import Cache
from salun.runs.folder import check_folder

QUICK = 0.5  # seconds; a pass that takes longer is measured once and with one sample, and scaled
REPEATS = 3  # of a quicker one
SPREAD = (0.8, 1.5)  # of times that follow from one pass, or from operations: batches and layers differ in speed
SIDE = 1024  # of the matrices whose product is timed for that


@dataclass(frozen=True)
class Pace:
    """Seconds that a pass of n samples takes, at least and at most."""

    forward: Callable[[int], tuple[float, float]]
    backward: Callable[[int], tuple[float, float]]


def preview(
    model: str,
    concept: ConceptSpec,
    options: EraseOptions,
    outputs: list[str],
    run_dir: Path,
    progress: Progress = silent,
    force: bool = False,
    resume: bool = False,
    cache: Cache | None = None,
) -> dict[str, Any]:
    """What `erase` would do with these arguments. Nothing is written but the cache, and no weight changes.

    Memory is simulated by the run's very steps (see `simulate`). Times are measured here with the loaded model, or,
    where it does not fit into memory, follow from its operations and the speed of a matrix product; latents in the
    cache are not subtracted. Raises what `erase` would.
    """
    for target in outputs:
        check_output(target, force)
    given = ModelOptions(**{item.name: getattr(options, item.name) for item in fields(ModelOptions)})
    spec = describe(model, given)
    check_output_paths(spec, outputs, run_dir, other_input_paths(options))
    previous = check_folder(run_dir, resume)
    device = pick_device(given.device)
    dtype = pick_dtype(given.dtype, device)
    progress(Event(Stage.MEASURING, message=f"measuring this machine for {spec.name}"))
    cache, free = cache or Cache.of_user(), _free_memory(device)
    resident = (_resident() or 0) if device.type == "cpu" else 0
    fit_of = partial(_fit, None if free is None else free - resident, spec, device, dtype, cache, options.batch_size)
    recorded = previous["options"] if previous is not None else None
    fitted = fitted_plan(spec.settings, spec.name, concept, options, fit_of, recorded)
    plan, advice = fitted.plan, fitted.warning
    if fitted.note:
        plan.notes.append(fitted.note)
    needs = simulate(spec, plan, device, dtype, cache)
    if not advice:
        loaded = load_with(model, options)
        if previous is not None:
            record_of(loaded, plan, outputs, run_dir).check_resumes(previous)
        with loaded.temporarily_trainable(), loaded.configured(plan.options):
            pace = measured_pace(loaded, plan)
    else:
        pace = _computed(operations(spec, plan, dtype), device, dtype)
    disk = disk_needed(spec, plan, outputs, run_dir)
    return {
        "model": spec.name,
        "device": str(device),
        "run_dir": str(run_dir),
        "concepts": [{"name": c.name, "anchor": c.anchor} for c in plan.concepts],
        "notes": plan.notes,
        "hints": [plan.few_steps.as_data()] if plan.few_steps else [],
        "steps": describe_steps(plan),
        "options": asdict(plan.options),
        "seconds": seconds_of(needs.sampled, plan, erasure_stages(plan), pace),
        "measured": not advice,
        "memory": _memory(needs, resident, free),
        "disk": {"needed": sum(disk.values()), "free": shutil.disk_usage(_existing(run_dir)).free},
        "warnings": _warnings(disk, advice),
    }


def _fit(
    free: int | None,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    cache: Cache,
    batch_size: int | None,
    plan: Plan,
) -> Fit:
    """How the plan fits, without changes on a CPU, whose memory can be freed and swapped. free: None if unknown."""
    if free is None:
        return Fit({}, "")
    needed = fit(free, spec, plan, device, dtype, cache, batch_size=batch_size)
    return needed if device.type == "cuda" else Fit({}, needed.text)


def _memory(needs: Needs, resident: int, free: int | None) -> dict[str, Any]:
    stages = {str(stage): size for stage, size in needs.peak.items()}
    return {"needed": needs.most + resident, "free": free, "stages": stages, "cpu": needs.cpu}


def _warnings(disk: dict[Path, int], memory: str) -> list[str]:
    warnings = []
    try:
        check_disk_space(disk)
    except ConfigError as error:
        warnings.append(str(error))
    return [*warnings, *([memory] if memory else [])]


def describe_steps(plan: Plan) -> list[str]:
    """What the run does, a line for each of its parts."""
    concepts, recipe, options = len(plan.concepts), plan.recipe, plan.options
    lines = []
    if options.forget_images:
        lines.append(f"encode {options.forget_images} as the forget set")
    if options.retain_images:
        lines.append(f"encode {options.retain_images} and add it to the retain set")
    forget, needed = recipe.forget_latents * concepts, plan.samples()
    if needed in ("forget", "anchor") and not (needed == "forget" and options.forget_images):
        purpose = " for the mask" if plan.method.data == "prompts" else ""
        lines.append(f"sample {forget} {needed} latents{purpose}, with {_sampling(plan)}")
    if needed == "all":
        lines.append(
            f"sample {0 if options.forget_images else forget} forget, {forget if recipe.anchor_share else 0} anchor "
            f"and {recipe.retain_latents} retain latents from {sum(len(c.forget) for c in plan.prompts.concepts)} "
            f"and {len(plan.prompts.retain)} prompts, with {_sampling(plan)}"
        )
    if plan.method.takes_mask and options.mask != "full":
        combined = f", {options.combine} for {concepts} concepts" if concepts > 1 else ""
        lines.append(f"select {options.density:.3g} of the weights ({options.mask}){combined}")
    lines.append(f"unlearn by {plan.method.title}{_steps(plan)}")
    lines.append(f"compare {recipe.eval_images * (concepts + 1)} images before with as many after")
    return lines


def _steps(plan: Plan) -> str:
    """What the steps of the method take; a method whose training takes no backward pass solves a closed form."""
    steps, batch = plan.recipe.steps, plan.recipe.batch_size
    if plan.closed_form:
        return ", in closed form" if plan.method.data == "prompts" else ""
    samples = f"{batch} forget and {batch} retain samples" if plan.method.data == "latents" else f"{batch} samples"
    if plan.goal is None:
        return f": {steps} steps of {samples}"
    most = f"at most {plan.budget} steps of {samples}"
    return f" until {plan.goal}: {most}, with a probe of held-out prompts every {plan.probe_every}"


def _sampling(plan: Plan) -> str:
    sampling = plan.sampling
    guidance = f"guidance {sampling.guidance:g}" if sampling.guided else "no guidance"
    return f"{sampling.steps} steps of {sampling.sampler or 'the default sampler'} with {guidance}"


def measured_pace(model: Model, plan: Plan) -> Pace:
    """By passes of the loaded model, the first of which does not count."""
    prompt = model.encode([plan.prompts.concepts[0].forget[0].text])
    parameters = parameters_in_scope(model, plan.scope)

    def run(n: int, graph: bool) -> float:
        x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        t = torch.full((n,), model.schedule.t_at(0.5), device=model.device)
        began = time.perf_counter()
        with torch.set_grad_enabled(graph), each_gradient(parameters if graph else {}, lambda name, gradient: None):
            out = model.predict(x, t, prompt.expand(n))
            if graph:
                out.square().mean().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began

    known: dict[tuple[int, bool], tuple[float, float]] = {}

    def of(graph: bool) -> Callable[[int], tuple[float, float]]:
        def cost(n: int) -> tuple[float, float]:
            if (n, graph) not in known:
                run(1, graph)  # warm-up
                single = run(1, graph)
                if single > QUICK:
                    known[n, graph] = (single * n * SPREAD[0], single * n * SPREAD[1])
                else:
                    times = [run(n, graph) for _ in range(REPEATS)]
                    known[n, graph] = (min(times), max(times))
            return known[n, graph]

        return cost

    return Pace(of(False), of(True))


def _computed(counts: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Pace:
    """From numbers of operations, forward and with backward, and the speed of a matrix product here."""
    matrix = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - began)
    speed = 2 * SIDE**3 / min(times[1:])

    def of(count: int) -> Callable[[int], tuple[float, float]]:
        return lambda n: (n * count / speed * SPREAD[0], n * count / speed * SPREAD[1])

    return Pace(of(counts[0]), of(counts[1]))


def seconds_of(at_once: int, plan: Plan, costs: Sequence[StageCost], pace: Pace) -> dict[str, Any]:
    """Seconds of each stage in the middle, of all, and of all at least and at most, by the passes of the plan.

    A goal may be reached after few steps, or not within its budget.

    Args:
        at_once: Images that are sampled together.
        costs: The stages of the plan.
    """
    sampled = at_once * (2 if plan.sampling.guided else 1)
    trained = 2 * plan.recipe.batch_size  # at once, in training and saliency

    def seconds(cost: StageCost) -> tuple[float, float]:
        samples = trained if cost.stage in (Stage.FROZEN_TARGETS, Stage.TRAINING) else sampled
        ends = []
        for end in (0, 1):
            forward = cost.forward + cost.closing
            passes = forward * pace.forward(samples)[end] / samples if forward else 0.0
            ends.append(passes + (cost.backward * pace.backward(trained)[end] / trained if cost.backward else 0.0))
        return ends[0], ends[1]

    stages: dict[Stage, tuple[float, float]] = {}
    for cost in costs:
        (least, most), (low, high) = stages.get(cost.stage, (0.0, 0.0)), seconds(cost)
        stages[cost.stage] = least + low, most + high
    low, high = (sum(ends[end] for ends in stages.values()) for end in (0, 1))
    for cost in costs:
        if plan.goal is not None and cost.stage is Stage.TRAINING:
            least, most = plan.probe_every / plan.recipe.steps, plan.budget / plan.recipe.steps
            of_steps = seconds(replace(cost, closing=0))
            low -= (1 - least) * of_steps[0]
            high += (most - 1) * of_steps[1]
            further = further_samples(plan) * plan.sampling.passes
            high += seconds(StageCost(Stage.SAMPLING, 1, forward=further))[1]
    middle = {str(stage): sum(ends) / 2 for stage, ends in stages.items()}
    return {**middle, "total": sum(middle.values()), "least": low, "most": high}


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    return min(free, *free_in_container()) + (_resident() or 0)


def _resident() -> int | None:
    """Bytes that this process holds by now: programs, libraries and the model."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
