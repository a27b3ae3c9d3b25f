"""One prompt at several strengths of an erasure, at one seed: from the original to the erased model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from salun.config import read_record
from salun.delta.delta import Delta
from salun.delta.stacking import check_strengths
from salun.diffusion.data.latents import decode_images, item_seed, sample_latents
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.options import EraseJob
from salun.errors import DataError
from salun.progress import Event, Progress, Stage, silent
from salun.runs.reading import file_of, read_finished
from salun.user_text import checked, prompt_text

if TYPE_CHECKING:
    from salun.runs.cache import Cache


@torch.no_grad()
def sample_strengths(
    model: DiffusionModel,
    delta: Delta,
    prompt: str,
    strengths: Sequence[float],
    seed: int = 0,
    progress: Progress = silent,
    cache: Cache | None = None,
) -> np.ndarray:
    """The image of a prompt at each strength of a delta, all from the same noise.

    The images are those of `salun sample --strength`: the first of the same prompt and seed. The model has its
    original weights afterwards.

    Args:
        delta: Of the model.
        strengths: 0 is the original, 1 the erased model; from −0.5 to 1.5.
        cache: Of latents sampled before; another strength then samples nothing but its own image.

    Returns:
        uint8 (len(strengths), H, W, 3).

    Raises:
        ConfigError: A strength is out of range.
        ModelError: The model is not the delta's base.
    """
    check_strengths(strengths)
    text, seeds = prompt_text(checked(prompt, "prompt")), [item_seed(seed, "sample", 0)]
    original, latents, steps = model.original(), [], model.settings.sampling.steps
    done = 0  # sampler steps

    def counted(event: Event, /) -> None:
        nonlocal done
        done = min(done + 1, len(strengths) * steps)
        progress(Event(Stage.SAMPLING, done, len(strengths) * steps))

    try:
        for number, strength in enumerate(strengths):
            done = number * steps
            model.load(original if strength == 0 else delta.apply(original, strength, known_hash=model.base_hash))
            weights = None if strength == 0 else _weights(delta, strength)
            latents.append(sample_latents(model, [text], seeds, counted, cache=cache, weights=weights))
        return np.concatenate([decode_images(model, each) for each in latents])  # alone, as `salun sample` does
    finally:
        model.load(original)


def sample_run(
    folder: Path,
    prompt: str,
    strengths: Sequence[float],
    seed: int = 0,
    *,
    model: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
    cache: Cache | None = None,
) -> np.ndarray:
    """As `sample_strengths`, of a finished run, sampled as its options say.

    Args:
        folder: Of the run, with its delta. model: its original, where that is no longer the model of its record.

    Raises:
        DataError: The run is not finished, or has no delta.
    """
    record = read_finished(folder)
    file = file_of(record, folder, "delta")
    if file is None:
        raise DataError(f"{folder} holds no delta", advice="Erase again without {output}")
    job = EraseJob(**read_record(record, folder / "run.json"))
    options = replace(job.options, device=device, allow_pickle=False)
    loaded = load_with(model or str(job.model), options)
    with loaded.configured(options):
        return sample_strengths(loaded, Delta.load(file), prompt, strengths, seed, progress, cache)


def _weights(delta: Delta, strength: float) -> str:
    """What the network's weights are, for the cache."""
    return hashlib.sha256(f"{delta.result_hash} {delta.id} {strength!r}".encode()).hexdigest()
