"""Sampling by diffusers' schedulers: the model's own if that is a fast one, else DPM-Solver++ (2M) on its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from salun.diffusion.denoiser import Conditioning, Denoiser
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
        doubled = scheduler.scale_model_input(torch.cat([x, x]), t)
        steps = t.to(device=model.device, dtype=torch.long).expand(2 * n)
        conditional, unconditional = model.predict(doubled, steps, conditioning).chunk(2)
        guided = unconditional + settings.guidance * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    return x


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What latents depend on here: the scheduler, by its resolved config, and the library."""
    return {
        "sampler": {name: repr(value) for name, value in _scheduler(config).config.items()},
        "diffusers": metadata.version("diffusers"),
    }


def _scheduler(config: Mapping[str, Any]) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        plain = str(config.get("algorithm_type", "dpmsolver++")).removeprefix("sde-")  # no noise that no seed fixes
        return DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type=plain)
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    fast = {key: config[key] for key in kept if key in config}
    return DPMSolverMultistepScheduler(**fast, timestep_spacing="trailing", use_karras_sigmas=False)
