"""Sampling a model in latent space: the training data of an erasure and the pictures it is judged by.

Every sample has a seed of its own, so it does not depend on what else is in its batch (but for float rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.denoiser import Conditioning
from salun.diffusion.models import Model
from salun.progress import Event, Progress, silent


def item_seed(seed: int, role: str, index: int) -> int:
    """The seed of one sample: runs with the same seed and role share pictures, whatever their number."""
    salt = {"forget": 1, "anchor": 2, "retain": 3, "eval": 4, "sample": 5}[role]
    return (seed * 1_000_003 + salt * 100_000_007 + index) % (1 << 63)


@torch.no_grad()
def sample_latents(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], progress: Progress = silent, stage: str = "sampling"
) -> Tensor:
    """One latent per prompt, float32 (n, c, h, w) on the model's device, scaled by the VAE's factor.

    Sampled with the model's own sampling settings by its own scheduler if that is a fast one, else by
    DPM-Solver++ (2M) on its noise schedule. The live UNet is used, erased or not.
    """
    unique = list(dict.fromkeys([*prompts, ""]))
    encoded = model.encode(unique)
    row = {text: i for i, text in enumerate(unique)}
    size = _batch_size(model)
    done = []
    for start in range(0, len(prompts), size):
        texts = prompts[start : start + size]
        index = torch.tensor([row[text] for text in texts], device=model.device)
        noise = torch.stack(
            [
                torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(s))
                for s in seeds[start : start + size]
            ]
        )
        done.append(_denoise(model, noise.to(model.device), encoded[index], encoded[row[""] : row[""] + 1]))
        progress(Event(stage, min(start + size, len(prompts)), len(prompts)))
    return torch.cat(done) if done else torch.empty(0, *model.latent_shape, device=model.device)


def sample_pictures(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], progress: Progress = silent, stage: str = "sampling"
) -> np.ndarray:
    """One uint8 picture per prompt, (n, H, W, 3)."""
    latents = sample_latents(model, prompts, seeds, progress, stage)
    side = model.settings.sampling.resolution
    parts = [model.decode(part) for part in latents.split(_batch_size(model))] if len(latents) else []
    return np.concatenate(parts) if parts else np.empty((0, side, side, 3), np.uint8)


def _denoise(model: Model, noise: Tensor, prompts: Conditioning, empty: Conditioning) -> Tensor:
    settings = model.settings.sampling
    scheduler = _scheduler(model.scheduler_config)
    scheduler.set_timesteps(settings.steps)
    n = len(noise)
    conditioning = Conditioning.cat([prompts, empty.expand(n)])
    x: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([x, x]), t)
        steps = t.to(device=model.device, dtype=torch.long).expand(2 * n)
        conditional, unconditional = model.predict(doubled, steps, conditioning).chunk(2)
        guided = unconditional + settings.guidance * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    return x


def _scheduler(config: dict[str, Any]) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        return DPMSolverMultistepScheduler.from_config(config)
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


def _batch_size(model: Model) -> int:
    """Samples at once: 64 of the embedded model's size, 2 of Stable Diffusion's at 512², 1 above."""
    _, height, width = model.latent_shape
    return max(1, min(64, 8192 // (height * width)))
