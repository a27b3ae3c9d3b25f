"""What an erasure would do and take, told before it begins: steps, memory, disk, and time measured on this machine."""

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
from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.erase import record_of
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import ConceptSpec, Plan, make_plan
from salun.diffusion.targets import STATE_BYTES, check_output_paths, disk_needed, other_input_paths
from salun.errors import ConfigError
from salun.files import check_disk_space
from salun.masking.mask import entries
from salun.options import EraseOptions
from salun.progress import Event, Progress, Stage, silent
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
    """What `erase` would do with these arguments. Nothing is written, no weight changed.

    Times are those of one forward and one backward pass here, multiplied; what other runs have left in the cache is not
    taken off. Memory: what is loaded, optimizer state and, measured, what a backward pass keeps. Raises what `erase`
    would.
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
    with loaded.temporarily_trainable(), loaded.set_up(plan.options):
        forward, backward, kept = _measure(loaded, plan)
        seconds, memory = _seconds(loaded, plan, forward, backward), _memory(loaded, plan, kept)
    places = disk_needed(loaded, plan, outputs, run_dir)
    disk = sum(places.values())
    free_disk = shutil.disk_usage(_existing(run_dir)).free
    free_memory = _free_memory(loaded.device)
    warnings = []
    try:
        check_disk_space(places)
    except ConfigError as error:
        warnings.append(str(error))
    if free_memory is not None and free_memory < memory:
        warnings.append("memory may not suffice: take a smaller --batch-size, --low-vram or --dtype bf16")
    return {
        "model": loaded.name,
        "device": str(loaded.device),
        "run_dir": str(run_dir),
        "concepts": [{"name": c.name, "anchor": c.anchor} for c in plan.concepts],
        "notes": plan.notes,
        "hints": [plan.few_steps.as_data()] if plan.few_steps else [],
        "steps": _story(plan),
        "options": asdict(plan.options),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "memory": {"needed": memory, "free": free_memory},
        "disk": {"needed": disk, "free": free_disk},
        "warnings": warnings,
    }


def _story(plan: Plan) -> list[str]:
    n, forget, retain = len(plan.concepts), plan.forget_latents * len(plan.concepts), plan.retain_latents
    sampled = 0 if plan.options.forget_images else forget
    said = sum(len(c.forget) for c in plan.prompts.concepts)
    images = [f"encode {plan.options.forget_images} as the forget set"] if plan.options.forget_images else []
    images += [f"encode {plan.options.retain_images} and keep what it shows"] if plan.options.retain_images else []
    return [
        *images,
        f"sample {sampled} forget, {forget if plan.anchor_share else 0} anchor and {retain} retain latents "
        f"from {said} and {len(plan.prompts.retain)} prompts, by {_sampling(plan)}",
        f"choose {plan.options.density:.3g} of the weights ({plan.options.mask})"
        + (f", {plan.options.combine} for {n} concepts" if n > 1 else ""),
        f"train {plan.steps} steps of {plan.batch_size} forget and {plan.batch_size} retain samples",
        f"look at {plan.eval_images * (n + 1)} pictures before and as many after",
    ]


def _sampling(plan: Plan) -> str:
    sampling = plan.sampling
    guidance = f"guidance {sampling.guidance:g}" if sampling.guided else "no guidance"
    return f"{sampling.steps} steps of {sampling.sampler or 'the default sampler'} with {guidance}"


def _measure(model: Model, plan: Plan) -> tuple[Callable[[int], float], Callable[[int], float], int]:
    """Seconds of a forward pass and of a forward and backward pass over n samples, and bytes kept per sample."""
    said = model.encode([plan.prompts.concepts[0].forget[0].text])
    parameters = parameters_in_scope(model, plan.options.scope)

    def run(n: int, graph: bool) -> tuple[float, Tensor]:
        x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        t = torch.full((n,), model.schedule.t_at(0.5), device=model.device)
        for parameter in parameters.values():
            parameter.requires_grad_(graph)
        began = time.perf_counter()
        with torch.set_grad_enabled(graph):
            out = model.predict(x, t, said.expand(n))
            if graph:
                out.square().mean().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        for parameter in parameters.values():
            parameter.grad = None
        return taken, out

    def timed(n: int, graph: bool) -> float:
        run(1, graph)  # the first pass pays for what later ones find ready
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
    kept = sum(size for place, size in seen.items() if place not in held)
    known: dict[tuple[int, bool], float] = {}

    def of(graph: bool) -> Callable[[int], float]:
        def cost(n: int) -> float:
            if (n, graph) not in known:
                known[n, graph] = timed(n, graph)
            return known[n, graph]

        return cost

    return of(False), of(True), kept


def _seconds(
    model: Model, plan: Plan, forward: Callable[[int], float], backward: Callable[[int], float]
) -> dict[str, float]:
    size, sampling = batch_size_of(model), plan.sampling
    per_latent = sampling.steps * forward((2 if sampling.guided else 1) * size) / size
    n, batch = len(plan.concepts), plan.batch_size
    latents = plan.forget_latents * n * (2 if plan.anchor_share else 1) + plan.retain_latents
    needs_saliency = plan.options.mask in ("saliency", "shuffled") and plan.options.method == "salun"
    passes = plan.saliency_timesteps * plan.forget_latents * n / batch if needs_saliency else 0.0
    frozen = plan.steps * forward(2 * batch) if plan.needs_frozen else 0.0
    return {
        "sampling": latents * per_latent,
        "saliency": passes * backward(2 * batch) if passes else 0.0,
        "training": plan.steps * backward(2 * batch) + frozen,
        "evaluating": 2 * plan.eval_images * (n + 1) * per_latent,
    }


def _memory(model: Model, plan: Plan, kept: int) -> int:
    modules = [model.unet, model.vae, *model.text_encoders]
    weights: int = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    total = sum(p.numel() for p in parameters_in_scope(model, plan.options.scope).values())
    salient = entries(total, plan.options.density) if plan.options.method == "salun" else total
    in_host = plan.options.low_vram and model.device.type != "cpu"
    saliency, training = (0, 0) if in_host else (4 * total, STATE_BYTES * salient)
    working = max(saliency, training) + 2 * plan.batch_size * kept
    if model.device.type != "cpu":
        return working + weights
    frozen = 4 * plan.steps * 2 * plan.batch_size * prod(model.latent_shape) if plan.needs_frozen else 0
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
