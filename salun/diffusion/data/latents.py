"""Sampling a model in latent space: the training set of an erasure and its evaluation images.

Every sample has its own seed, so it does not depend on the rest of its batch (except for float rounding).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from salun.compute.processes import current_processes
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
from salun.evaluation.lazy_images import LazyImages
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache, digest_of, key_of


def item_seed(seed: int, role: str, index: int) -> int:
    """The seed of one sample: runs with the same seed and role share samples, whatever their number."""
    salt = {"forget": 1, "anchor": 2, "retain": 3, "eval": 4, "sample": 5, "probe": 6, "attack": 7}[role]
    return (seed * 1_000_003 + salt * 100_000_007 + index) % (1 << 63)


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress = silent,
    stage: Stage = Stage.SAMPLING,
    cache: Cache | None = None,
    weights: str | None = None,
) -> Tensor:
    """One latent per prompt, float32 (n, c, h, w) on the model's device, scaled by the VAE's factor.

    Sampled by the model's own sampler and settings (`denoise`) with the live UNet, erased or not. Several processes
    divide the batches among them, and all get all of them.

    Args:
        cache: Of batches sampled before; only for a model that holds its original weights, or where `weights` is given.
        weights: A hash of the network's weights, where they are not the original ones.
    """
    negative = model.settings.sampling.negative_prompt
    unique = list(dict.fromkeys([*prompts, negative]))
    encoded = model.encode(unique)
    row = {text: i for i, text in enumerate(unique)}
    size = batch_size_of(model)
    done: dict[int, Tensor] = {}
    restored = 0
    processes = current_processes()
    starts = range(0, len(prompts), size)
    for number, start in enumerate(starts):
        if not processes.owns(number):
            continue
        batch_seeds = list(seeds[start : start + size])
        index = torch.tensor([row[text] for text in prompts[start : start + size]], device=model.device)
        conditioning, empty = encoded[index], encoded[row[negative] : row[negative] + 1]
        key = _key(model, conditioning, empty, batch_seeds, weights) if cache is not None else ""
        entry = cache.get(key) if cache is not None else None
        end = min(start + size, len(prompts))
        if entry is not None:
            restored += end - start
        else:

            def on_step(start: int = start, restored: int = restored) -> None:  # a host may cancel between two steps
                progress(Event(stage, start, len(prompts), restored=restored))

            generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
            noise = noise_of(model, generators)
            entry = {"latents": model.denoise(noise, conditioning, empty, on_step, generators)}
            if cache is not None:
                cache.put(key, entry)
        done[number] = entry["latents"].to(model.device)
        progress(Event(stage, end, len(prompts), restored=restored))
    shapes = [(min(size, len(prompts) - start), *model.latent_shape) for start in starts]
    parts = processes.gather(done, shapes, model.device)
    return torch.cat(parts) if parts else torch.empty(0, *model.latent_shape, device=model.device)


@torch.no_grad()
def sample_conditionings(
    model: DiffusionModel,
    conditioning: Conditioning,
    seeds: Sequence[int],
    progress: Progress = silent,
    stage: Stage = Stage.SAMPLING,
) -> Tensor:
    """As `sample_latents`, of conditionings (n,), which need not come from prompts."""
    empty = model.encode([model.settings.sampling.negative_prompt])
    size, parts = batch_size_of(model), []
    for start in range(0, len(seeds), size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + size]]
        batch = conditioning[slice(start, start + size)]

        def on_step(start: int = start) -> None:
            progress(Event(stage, start, len(seeds)))

        parts.append(model.denoise(noise_of(model, generators), batch, empty, on_step, generators))
    return torch.cat(parts) if parts else torch.empty(0, *model.latent_shape, device=model.device)


@torch.no_grad()
def sample_until(
    model: DiffusionModel,
    prompts: Conditioning,
    empty: Conditioning,
    step: int,
    steps: int,
    guidance: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(x_t, t) after `step` of `steps` DDIM steps from noise (η 0) with the live network.

    Args:
        prompts, empty: (n,) each; guidance is the guidance scale between them.

    Returns:
        x_t, float32 (n, c, h, w), and its timestep t, (n,).
    """
    n, schedule = len(prompts), model.schedule
    times = [torch.full((n,), schedule.t_at((steps - i - 0.5) / steps), device=model.device) for i in range(step + 1)]
    x = torch.randn(n, *model.latent_shape, generator=generator).to(model.device)
    both, zeros = Conditioning.cat([prompts, empty]), torch.zeros_like(x)
    for t, following in itertools.pairwise(times):
        of_prompt, of_empty = model.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        x_0 = schedule.x_0(x, of_empty + guidance * (of_prompt - of_empty), t)
        noise = (x - schedule.add_noise(x_0, zeros, t)) / schedule.add_noise(zeros, torch.ones_like(x), t)
        x = schedule.add_noise(x_0, noise, following)
    return x, times[step]


def sample_images(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress = silent,
    stage: Stage = Stage.SAMPLING,
    cache: Cache | None = None,
) -> np.ndarray:
    """One uint8 image per prompt, (n, H, W, 3); arguments as `sample_latents`."""
    return decode_images(model, sample_latents(model, prompts, seeds, progress, stage, cache))


def decode_images(model: DiffusionModel, latents: Tensor) -> np.ndarray:
    """uint8 images (n, H, W, 3) of latents (n, c, h, w), a batch at a time."""
    side = model.settings.sampling.resolution
    with model.on_device(model.vae):
        parts = [model.decode(part) for part in latents.split(batch_size_of(model))] if len(latents) else []
    return np.concatenate(parts) if parts else np.empty((0, side, side, 3), np.uint8)


def lazy_images(model: DiffusionModel, latents: Tensor) -> LazyImages:
    """Images of latents (n, c, h, w), the same as `decode_images` gives.

    A batch is decoded when an image of it is read, and held until another one is; so whoever reads them in order
    decodes each batch once.
    """
    size = batch_size_of(model)

    @lru_cache(maxsize=1)
    def batch(number: int) -> np.ndarray:
        return model.decode(latents[number * size : (number + 1) * size])

    return LazyImages(len(latents), lambda i: batch(i // size)[i % size])


def noise_of(model: DiffusionModel, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (n, c, h, w) on the model's device, each row drawn by its own generator."""
    return torch.stack([torch.randn(model.latent_shape, generator=each) for each in generators]).to(model.device)


def _key(
    model: DiffusionModel, prompts: Conditioning, empty: Conditioning, seeds: list[int], weights: str | None
) -> str:
    """The cache key of a batch: everything it depends on. Prompts count by their encodings, and so do the encoders."""
    encodings = [
        t for part in (prompts, empty) for t in (part.hidden, *(part.extra[name] for name in sorted(part.extra)))
    ]
    settings = model.settings.sampling
    return key_of(
        what="latents",
        model=weights or model.base_hash,
        prompts=digest_of(*encodings),
        seeds=seeds,
        steps=settings.steps,
        guidance=settings.guidance,
        shape=model.latent_shape,
        dtype=str(model.dtype),
        device=model.device.type,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        torch=torch.__version__,
        **model.sampler_facts(),
    )


def batch_size_of(model: DiffusionModel) -> int:
    """Samples at once: 64 of the bundled model's size, 2 of Stable Diffusion's at 512², 1 above and for low VRAM."""
    if model.low_vram:
        return 1
    _, height, width = model.latent_shape
    return max(1, min(64, 8192 // (height * width)))
