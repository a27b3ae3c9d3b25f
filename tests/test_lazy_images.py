"""Images that are decoded when they are read: the same as at once, a batch of them in memory."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from salun.diffusion.data import latents as module
from salun.diffusion.data.latents import decode_images, lazy_images
from salun.diffusion.model.stable_diffusion import Model
from salun.evaluation.detector import Samples
from salun.evaluation.lazy_images import LazyImages, joined, picked


def numbered(n: int) -> LazyImages:
    """Images of two pixels a side, each filled with its number."""
    return LazyImages(n, lambda i: np.full((2, 2, 3), i, np.uint8))


def values(images: object) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]  # type: ignore[attr-defined]


def test_lazy_images_are_a_sequence_whose_slices_are_arrays() -> None:
    images = numbered(5)
    assert len(images) == 5 and values(images) == [0, 1, 2, 3, 4] and values([images[-1]]) == [4]
    part = images[1:4]
    assert isinstance(part, np.ndarray) and part.shape == (3, 2, 2, 3) and values(part) == [1, 2, 3]
    with pytest.raises(IndexError):
        images[5]


def test_lazy_images_are_picked_and_joined_without_being_read() -> None:
    unread = LazyImages(3, lambda _: pytest.fail("it was read"))
    assert len(unread.rows([2, 0])) == 2 and len(joined([unread, unread])) == 6
    assert values(numbered(5).rows([3, 1])) == [3, 1]
    assert values(joined([numbered(2), np.full((1, 2, 2, 3), 9, np.uint8)])) == [0, 1, 9]
    assert values(picked([(numbered(4), 3), (numbered(2), 0)])) == [3, 0]


def test_samples_with_lazy_images_are_divided_and_joined_as_those_with_arrays() -> None:
    arrays = Samples(numbered(4)[:], torch.arange(4.0)[:, None], ["a", "b", "c", "d"])
    lazy = Samples(numbered(4), arrays.latents, arrays.prompts)
    for samples in (arrays, lazy):
        some = samples[np.array([2, 0])]
        assert (
            values(some.images) == [2, 0] and some.prompts == ["c", "a"] and some.latents.flatten().tolist() == [2, 0]
        )
        both = Samples.cat([samples[:1], samples[3:]])
        assert values(both.images) == [0, 3] and list(both.prompts) == ["a", "d"]
        assert both.latents.flatten().tolist() == [0, 3]
    assert isinstance(lazy[1:].images, LazyImages)


def test_lazy_images_of_latents_decode_each_batch_once_and_hold_one(
    shapes: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "batch_size_of", lambda _: 2)
    latents = torch.randn(7, *shapes.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = decode_images(shapes, latents)
    alive: list[int] = []
    decode = shapes.decode

    def counted(part: torch.Tensor) -> np.ndarray:
        batch = decode(part).copy()
        alive.append(len(batch))
        weakref.finalize(batch, alive.append, -len(batch))
        return batch

    monkeypatch.setattr(shapes, "decode", counted)
    images, peak = lazy_images(shapes, latents), 0
    for image, same in zip(images, expected, strict=True):
        assert np.array_equal(image, same)
        peak = max(peak, sum(alive))
    assert [n for n in alive if n > 0] == [2, 2, 2, 1] and peak <= 4  # the next one is decoded before the last is freed
