"""The size of a model's samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salun.diffusion.model.settings import ModelSettings
    from salun.diffusion.options import Sampling


class SampledSizes:
    """What a model's class inherits to sample images of other sizes than its own."""

    settings: ModelSettings
    _size: tuple[int, int] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of sampled images: squares, but within `sampling_as`."""
        side = self.settings.sampling.resolution
        return self._size or (side, side)

    @contextmanager
    def sampling_as(self, sampling: Sampling, size: tuple[int, int]) -> Iterator[None]:
        """Context manager: sample with these settings, images of this height and width, multiples of `multiple`."""
        before = self.settings, self._size
        self.settings, self._size = replace(self.settings, sampling=sampling), size
        try:
            yield
        finally:
            self.settings, self._size = before
