"""Sampling by diffusers' schedulers: the one that is named, else the model's own DPM-Solver, else DPM-Solver++ (2M)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from salun.diffusion.model.protocol import Conditioning, Denoiser
from salun.diffusion.model.schedule import schedule_fields
from salun.diffusion.options import Sampling

LCM_STEPS = 50  # of the sampler that a consistency model was distilled from (Luo et al. 2023); it skips along these


def denoise(
    model: Denoiser,
    config: Mapping[str, Any],
    settings: Sampling,
    noise: Tensor,
    prompts: Conditioning,
    empty: Conditioning,
    on_step: Callable[[], None],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Noise (n, c, h, w) of variance 1 → latents, with guidance. config: of the model's scheduler.

    generators: (n,), of the noise that ancestral samplers add at each step.
    """
    scheduler = _scheduler(config, settings.sampler)
    _set_timesteps(scheduler, settings.steps)
    conditioning = conditioning_of(settings, prompts, empty)
    random = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        on_step()
        steps = t.to(device=model.device, dtype=torch.long).expand(len(noise))
        output = guided(model, scheduler.scale_model_input(x, t), steps, conditioning, settings)
        x = scheduler.step(output, t, x, **random).prev_sample
    return x


def conditioning_of(settings: Sampling, prompts: Conditioning, empty: Conditioning) -> Conditioning:
    """What `guided` takes: the prompts (n,), and where guidance is computed what it leads away from, n times."""
    return Conditioning.cat([prompts, empty.expand(len(prompts))]) if settings.guided else prompts


def guided(model: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning, settings: Sampling) -> Tensor:
    """The network's output under classifier-free guidance (Ho & Salimans 2022): u + s·(c − u), both in one batch.

    Without guidance (scale 1 or less) it is c, in one pass. x_t: (n, c, h, w). t: (n,). conditioning: of
    `conditioning_of`.
    """
    if not settings.guided:
        return model.predict(x_t, t, conditioning)
    conditional, unconditional = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), conditioning).chunk(2)
    return unconditional + settings.guidance * (conditional - unconditional)


def trailing(steps: int, total: int) -> Tensor:
    """Timesteps of a sampler, int64 (steps,), from the last one down ("trailing": Lin et al. 2024, table 2)."""
    return (torch.arange(steps) * -(total / steps) + total).round().long() - 1


def facts(config: Mapping[str, Any], settings: Sampling) -> dict[str, Any]:
    """What latents depend on here: the scheduler, by its class and resolved config, and the library."""
    scheduler = _scheduler(config, settings.sampler)
    resolved = scheduler.config  # (its private entries come in another order in every process)
    return {
        "scheduler": type(scheduler).__name__,
        "sampler": {name: repr(value) for name, value in resolved.items() if not name.startswith("_")},
        "diffusers": metadata.version("diffusers"),
    }


def _scheduler(config: Mapping[str, Any], sampler: str | None) -> Any:
    import diffusers

    if sampler is None and config.get("_class_name") == "DPMSolverMultistepScheduler":
        plain = str(config.get("algorithm_type", "dpmsolver++")).removeprefix("sde-")  # no noise that no seed fixes
        return diffusers.DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type=plain)
    schedule = schedule_fields(config, "the model")
    if "prediction_type" in config:
        schedule["prediction_type"] = config["prediction_type"]
    if sampler == "lcm":
        return diffusers.LCMScheduler(**schedule, timestep_spacing="trailing", clip_sample=False)
    if sampler == "ddim":
        return diffusers.DDIMScheduler(**schedule, timestep_spacing="trailing", clip_sample=False)
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="trailing")
    if sampler == "euler_a":
        return diffusers.EulerAncestralDiscreteScheduler(**schedule, timestep_spacing="trailing")
    return diffusers.DPMSolverMultistepScheduler(**schedule, timestep_spacing="trailing", use_karras_sigmas=False)


def _set_timesteps(scheduler: Any, steps: int) -> None:
    if type(scheduler).__name__ == "LCMScheduler":
        scheduler.set_timesteps(steps, original_inference_steps=max(steps, LCM_STEPS))
    else:
        scheduler.set_timesteps(steps)
