"""One prompt at several strengths of an erasure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from salun.delta.delta import Delta
from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.strengths import sample_run, sample_strengths
from salun.errors import ConfigError, DataError
from salun.progress import Event
from salun.runs.cache import Cache


def test_strengths_begin_with_the_original_and_end_with_the_erased_model(
    shapes: Model, run_folder: Path, tmp_path: Path
) -> None:
    """The images are those of `salun sample`; the model keeps its weights, and what was sampled is in the cache."""
    delta, cache, prompt = Delta.load(run_folder / "delta.salun.safetensors"), Cache(tmp_path / "cache"), "a circle"
    original, half, erased = sample_strengths(shapes, delta, prompt, [0.0, 0.5, 1.0], 5, cache=cache)
    assert np.array_equal(original, sample_images(shapes, [prompt], [item_seed(5, "sample", 0)])[0])
    shapes.load(delta.apply(shapes.original()))
    assert np.array_equal(erased, sample_images(shapes, [prompt], [item_seed(5, "sample", 0)])[0])
    shapes.load(shapes.original())
    assert not np.array_equal(original, erased) and not np.array_equal(half, erased)
    events: list[Event] = []
    again = sample_strengths(shapes, delta, prompt, [0.0, 1.0], 5, events.append, cache)
    assert np.array_equal(again, np.stack([original, erased]))
    assert len(events) == 2  # from the cache, no sampler step
    with pytest.raises(ConfigError, match=r"is 1\.6, but must be from -0\.5 to 1\.5"):
        sample_strengths(shapes, delta, prompt, [1.6])


def test_a_run_without_its_delta_cannot_be_sampled(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run_folder / "run.json").read_bytes())
    with pytest.raises(DataError, match="holds no delta"):
        sample_run(tmp_path, "a circle", [1.0])
