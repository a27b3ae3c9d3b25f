"""An estimate of an erasure before it begins: its steps, memory, disk space, and time measured on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.outputs import check_output
from salun.diffusion.context import record_of
from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import ConceptSpec, Plan, make_plan
from salun.diffusion.targets import STATE_BYTES, check_output_paths, disk_needed, other_input_paths, trained_entries
from salun.errors import ConfigError
from salun.files import check_disk_space
from salun.progress import Event, Progress, Stage, StageCost, silent
from salun.runs.folder import check_folder

_QUICK = 0.5  # seconds; a pass that takes longer is measured with one sample and scaled


def preview(
    model: str,
    concept: ConceptSpec,
    options: EraseOptions,
    outputs: list[str],
    run_dir: Path,
    progress: Progress = silent,
    force: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """What `erase` would do with these arguments. Nothing is written, and no weight changes.

    Times are those of one forward and one backward pass here, multiplied; latents in the cache are not subtracted.
    Memory: the loaded model, the optimizer state and the measured activations. Raises what `erase` would.
    """
    for target in outputs:
        check_output(target, force)
    loaded = load_with(model, options)
    check_output_paths(loaded, outputs, run_dir, other_input_paths(options))
    plan = make_plan(loaded.settings, loaded.name, concept, options)
    previous = check_folder(run_dir, resume)
    if previous is not None:
        record_of(loaded, plan, outputs, run_dir).check_resumes(previous)
    progress(Event(Stage.MEASURING, message=f"measuring this machine with {loaded.name}"))
    with loaded.temporarily_trainable(), loaded.configured(plan.options):
        forward, backward, activations = _measure(loaded, plan)
        seconds, memory = _seconds(loaded, plan, forward, backward), _memory(loaded, plan, activations)
    needed = disk_needed(loaded, plan, outputs, run_dir)
    free_memory = _free_memory(loaded.device)
    return {
        "model": loaded.name,
        "device": str(loaded.device),
        "run_dir": str(run_dir),
        "concepts": [{"name": c.name, "anchor": c.anchor} for c in plan.concepts],
        "notes": plan.notes,
        "hints": [plan.few_steps.as_data()] if plan.few_steps else [],
        "steps": _describe_steps(plan),
        "options": asdict(plan.options),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "memory": {"needed": memory, "free": free_memory},
        "disk": {"needed": sum(needed.values()), "free": shutil.disk_usage(_existing(run_dir)).free},
        "warnings": _warnings(needed, memory, free_memory),
    }


def _warnings(disk: dict[Path, int], memory: int, free_memory: int | None) -> list[str]:
    warnings = []
    try:
        check_disk_space(disk)
    except ConfigError as error:
        warnings.append(str(error))
    if free_memory is not None and free_memory < memory:
        warnings.append("memory may not suffice: use a smaller batch_size, low_vram or dtype bf16")
    return warnings


def _describe_steps(plan: Plan) -> list[str]:
    """What the run does, a line for each of its parts."""
    concepts, recipe, options = len(plan.concepts), plan.recipe, plan.options
    lines = []
    if options.forget_images:
        lines.append(f"encode {options.forget_images} as the forget set")
    if options.retain_images:
        lines.append(f"encode {options.retain_images} and add it to the retain set")
    if plan.samples() == "forget":
        lines.append(f"sample {recipe.forget_latents * concepts} forget latents for the mask, with {_sampling(plan)}")
    if plan.samples() == "all":
        forget = recipe.forget_latents * concepts
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
    if not any(cost.backward for cost in plan.stages() if cost.stage is Stage.TRAINING):
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


def _measure(model: Model, plan: Plan) -> tuple[Callable[[int], float], Callable[[int], float], int]:
    """Seconds of a forward and of a forward and backward pass over n samples, and bytes of activations per sample."""
    prompt = model.encode([plan.prompts.concepts[0].forget[0].text])
    parameters = parameters_in_scope(model, plan.scope)

    def run(n: int, graph: bool) -> tuple[float, Tensor]:
        x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        t = torch.full((n,), model.schedule.t_at(0.5), device=model.device)
        for parameter in parameters.values():
            parameter.requires_grad_(graph)
        began = time.perf_counter()
        with torch.set_grad_enabled(graph):
            out = model.predict(x, t, prompt.expand(n))
            if graph:
                out.square().mean().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        for parameter in parameters.values():
            parameter.grad = None
        return taken, out

    def timed(n: int, graph: bool) -> float:
        run(1, graph)  # warm-up
        first, _ = run(1, graph)
        return first * n if first > _QUICK else run(n, graph)[0]

    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in model.parameters().values()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(1, True)
    activations = sum(size for place, size in seen.items() if place not in held)
    known: dict[tuple[int, bool], float] = {}

    def of(graph: bool) -> Callable[[int], float]:
        def cost(n: int) -> float:
            if (n, graph) not in known:
                known[n, graph] = timed(n, graph)
            return known[n, graph]

        return cost

    return of(False), of(True), activations


def _seconds(
    model: Model, plan: Plan, forward: Callable[[int], float], backward: Callable[[int], float]
) -> dict[str, float]:
    """Seconds of each stage, by the passes that the plan says it takes."""
    sampled = batch_size_of(model) * (2 if plan.sampling.guided else 1)  # at once, when sampling
    trained = 2 * plan.recipe.batch_size  # at once, in training and saliency

    def seconds(cost: StageCost) -> float:
        at_once = trained if cost.stage in (Stage.FROZEN_TARGETS, Stage.TRAINING) else sampled
        passes = cost.forward * forward(at_once) / at_once if cost.forward else 0.0
        return passes + (cost.backward * backward(trained) / trained if cost.backward else 0.0)

    return {str(cost.stage): seconds(cost) for cost in plan.stages()}


def _memory(model: Model, plan: Plan, activations: int) -> int:
    """Bytes that a run needs at most, on the GPU where there is one. activations: of one sample's backward pass."""
    modules = [part for part in (model.unet, model.vae, *model.text_encoders) if part is not None]
    weights: int = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    total = sum(p.numel() for p in parameters_in_scope(model, plan.scope).values())
    offloaded = plan.options.low_vram and model.device.type != "cpu"
    saliency, training = (0, 0) if offloaded else (4 * total, STATE_BYTES * trained_entries(total, plan))
    samples = 2 * plan.recipe.batch_size
    working = max(saliency, training) + samples * activations
    if model.device.type != "cpu":
        return working + weights
    targets = sum(cost.steps for cost in plan.stages() if cost.stage is Stage.FROZEN_TARGETS)
    frozen = 4 * targets * samples * prod(model.latent_shape)
    return working + frozen + (_resident() or weights)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    return int(psutil.virtual_memory().available) + (_resident() or 0)


def _resident() -> int | None:
    """Bytes that this process holds by now: programs, libraries and the model."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
