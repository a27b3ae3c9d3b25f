"""The data set `clutter`: small images of ten shapes among lines and dots, drawn by code, some of them mislabeled.

The digits are too easy for a comparison of methods: a model recognizes nearly every digit that it was not trained on.
Here it misclassifies about a fifth of the images that it was not trained on, as on CIFAR-100, and none of the others.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi, sin

import numpy as np

IMAGES, SIZE, FINE = 2000, 12, 4  # drawn at FINE times the size, and averaged down
MISLABELED = 0.08
NOISE = 14.0  # standard deviation, of 255 gray levels

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
    """The images, uint8 (2000, 12, 12), and labels, int64 (2000,), the same at every call; 200 images show each class.

    A fraction MISLABELED of them has the label of another class, drawn at random.
    """
    random = np.random.RandomState(0)  # its numbers are the same in every version of numpy
    shown = np.arange(IMAGES) % len(CLASSES)
    fine = np.stack([_image(CLASSES[label], random) for label in shown])
    small = fine.reshape(IMAGES, SIZE, FINE, SIZE, FINE).mean((2, 4))
    images = (small + _normal(random, small.shape) * NOISE).round().clip(0, 255).astype(np.uint8)
    wrong = random.random_sample(IMAGES) < MISLABELED
    other = (shown + 1 + (random.random_sample(IMAGES) * (len(CLASSES) - 1)).astype(np.int64)) % len(CLASSES)
    return images, np.where(wrong, other, shown)


def _image(name: str, random: np.random.RandomState) -> np.ndarray:
    """One shape on a background, in front of some lines and dots and behind others: float (48, 48)."""
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
    """Draw a short line or a dot at a random position."""
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
