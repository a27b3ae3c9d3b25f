"""Images that are made or read when they are needed, so that a set of any size takes the memory of a few of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class LazyImages(Sequence[np.ndarray]):
    """A sequence of images that holds none of them: an index gives one, a slice an array of those of equal size.

    Args:
        n: How many there are.
        read: Number, from 0 → image, uint8 (h, w, 3).
    """

    def __init__(self, n: int, read: Callable[[int], np.ndarray]) -> None:
        self._numbers, self._read = range(n), read

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """uint8 (h, w, 3), or of a slice of at least one image uint8 (n, h, w, 3)."""
        numbers = self._numbers[index]
        if isinstance(numbers, int):
            return self._read(numbers)
        images = np.empty((len(numbers), *self._read(numbers[0]).shape), np.uint8)
        for i, number in enumerate(numbers):
            images[i] = self._read(number)
        return images

    def rows(self, numbers: Sequence[int]) -> LazyImages:
        """Those of these numbers, in this order."""
        return picked([(self, number) for number in numbers])


def picked(sources: Sequence[tuple[Sequence[np.ndarray] | np.ndarray, int]]) -> LazyImages:
    """One image of each pair: images, and the number of one of them."""
    return LazyImages(len(sources), lambda i: sources[i][0][sources[i][1]])


def joined(parts: Sequence[Sequence[np.ndarray] | np.ndarray]) -> LazyImages:
    """The images of all parts, one part after the other."""
    return picked([(part, i) for part in parts for i in range(len(part))])
