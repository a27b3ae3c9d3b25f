"""The data set `clutter`: small pictures of ten shapes among lines and dots, drawn by code, some of them mislabelled.

The digits are too easy to compare methods on: a model that never saw a digit knows it all the same. Here it is wrong
about every fifth picture that it was not trained on, as on CIFAR-100, while it learns every one that it was.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi, sin

import numpy as np

PICTURES, SIZE, FINE = 2000, 12, 4  # drawn at FINE times the size, and averaged down
MISLABELLED = 0.08
NOISE = 14.0  # standard deviation, of 255 grey levels

_ROUND = [(cos(2 * pi * i / 24), sin(2 * pi * i / 24)) for i in range(25)]
_BOX = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8)]
FILLED = {"disc": _ROUND, "square": _BOX, "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)]}
STROKES = {
    "ring": [_ROUND],
    "frame": [_BOX],
    "plus": [[(-1.0, 0.0), (1.0, 0.0)], [(0.0, -1.0), (0.0, 1.0)]],
    "saltire": [[(-0.8, -0.8), (0.8, 0.8)], [(-0.8, 0.8), (0.8, -0.8)]],
    "bar": [[(-1.0, 0.0), (1.0, 0.0)]],
    "angle": [[(-0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)]],
    "tee": [[(-0.9, -0.8), (0.9, -0.8)], [(0.0, -0.8), (0.0, 1.0)]],
}
CLASSES = (*FILLED, *STROKES)


@cache
def draw() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (2000, 12, 12) and int64 (2000,): the same at every call, 200 pictures drawn of each class.

    A share of MISLABELLED is labelled as any other class, whatever it shows.
    """
    random = np.random.RandomState(0)  # its numbers are the same in every version of numpy
    shown = np.arange(PICTURES) % len(CLASSES)
    fine = np.stack([_picture(CLASSES[label], random) for label in shown])
    small = fine.reshape(PICTURES, SIZE, FINE, SIZE, FINE).mean((2, 4))
    images = (small + _normal(random, small.shape) * NOISE).round().clip(0, 255).astype(np.uint8)
    wrong = random.random_sample(PICTURES) < MISLABELLED
    other = (shown + 1 + (random.random_sample(PICTURES) * (len(CLASSES) - 1)).astype(np.int64)) % len(CLASSES)
    return images, np.where(wrong, other, shown)


def _picture(name: str, random: np.random.RandomState) -> np.ndarray:
    """One shape on a ground with clutter, in front of some of it and behind the rest: float (48, 48)."""
    from PIL import Image, ImageDraw

    side = SIZE * FINE
    u = random.random_sample
    ground = 60 + 135 * u()
    image = Image.new("L", (side, side), int(ground))
    brush = ImageDraw.Draw(image)
    strength = 45 + 75 * u()
    ink = int(ground + strength if ground < 128 else ground - strength)
    for _ in range(4):
        _clutter(brush, side, int(ground + (u() - 0.5) * 150), random)
    size, angle = side * (0.24 + 0.12 * u()), (u() - 0.5) * pi / 4
    x, y = side * (0.36 + 0.28 * u()), side * (0.36 + 0.28 * u())

    def placed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        c, s = size * cos(angle), size * sin(angle)
        return [(x + c * a - s * b, y + s * a + c * b) for a, b in points]

    if name in FILLED:
        brush.polygon(placed(FILLED[name]), fill=ink)
    for stroke in STROKES.get(name, ()):
        brush.line(placed(stroke), fill=ink, width=int(side * 0.1), joint="curve")
    _clutter(brush, side, int(ground + (u() - 0.5) * 150), random)
    return np.asarray(image, np.float64)


def _clutter(brush, side: int, ink: int, random: np.random.RandomState) -> None:  # type: ignore[no-untyped-def]
    """A short line or a dot, anywhere."""
    u = random.random_sample
    x, y, length, angle = side * u(), side * u(), side * (0.15 + 0.25 * u()), 2 * pi * u()
    if u() < 0.6:
        brush.line([(x, y), (x + length * cos(angle), y + length * sin(angle))], fill=ink, width=int(2 + 3 * u()))
    else:
        r = side * (0.03 + 0.06 * u())
        brush.ellipse([x - r, y - r, x + r, y + r], fill=ink)


def _normal(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers by Box and Muller's formula."""
    n = int(np.prod(shape))
    radius = np.sqrt(-2 * np.log(1 - random.random_sample(n)))
    drawn: np.ndarray = radius * np.cos(2 * pi * random.random_sample(n))
    return drawn.reshape(shape)
