"""Sampling by diffusers' schedulers: the model's own if that is a fast one, else DPM-Solver++ (2M) on its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from salun.diffusion.denoiser import Conditioning, Denoiser
from salun.diffusion.schedule import schedule_fields
from salun.options import Sampling


def denoise(
    model: Denoiser,
    config: Mapping[str, Any],
    settings: Sampling,
    noise: Tensor,
    prompts: Conditioning,
    empty: Conditioning,
    tick: Callable[[], None],
) -> Tensor:
    """Noise (n, c, h, w) of variance 1 → latents, with guidance. config: of the model's scheduler."""
    scheduler = _scheduler(config)
    scheduler.set_timesteps(settings.steps)
    n = len(noise)
    conditioning = Conditioning.cat([prompts, empty.expand(n)])
    x: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        tick()
        steps = t.to(device=model.device, dtype=torch.long).expand(n)
        said = guided(model, scheduler.scale_model_input(x, t), steps, conditioning, settings.guidance)
        x = scheduler.step(said, t, x).prev_sample
    return x


def guided(model: Denoiser, x_t: Tensor, t: Tensor, both: Conditioning, scale: float) -> Tensor:
    """The network's output under classifier-free guidance (Ho & Salimans 2022): u + s·(c − u), both in one batch.

    x_t: (n, c, h, w). t: (n,). both: (2n,), the prompts and then what guidance leads away from.
    """
    asked, unasked = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return unasked + scale * (asked - unasked)


def trailing(steps: int, total: int) -> Tensor:
    """Timesteps of a sampler, int64 (steps,), from the last one down ("trailing": Lin et al. 2024, table 2)."""
    return (torch.arange(steps) * -(total / steps) + total).round().long() - 1


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What latents depend on here: the scheduler, by its resolved config, and the library."""
    resolved = _scheduler(config).config  # (its private entries come in another order in every process)
    return {
        "sampler": {name: repr(value) for name, value in resolved.items() if not name.startswith("_")},
        "diffusers": metadata.version("diffusers"),
    }


def _scheduler(config: Mapping[str, Any]) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        plain = str(config.get("algorithm_type", "dpmsolver++")).removeprefix("sde-")  # no noise that no seed fixes
        return DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type=plain)
    fast = schedule_fields(config, "the model")
    if "prediction_type" in config:
        fast["prediction_type"] = config["prediction_type"]
    return DPMSolverMultistepScheduler(**fast, timestep_spacing="trailing", use_karras_sigmas=False)
