"""The world of `shapes`: 64×64 images of one shape, drawn by code, with captions.

An image is drawn at 256×256 and box-filtered to 64×64. Everything random comes from one `numpy` generator, so a seed
fixes the whole data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter

ASSETS = Path(__file__).resolve().parents[2] / "salun" / "assets" / "shapes"
VOCABULARY = yaml.safe_load((ASSETS / "salun.yaml").read_text(encoding="utf-8"))["vocabulary"]
SHAPES: list[str] = VOCABULARY["attributes"]["shape"]
COLOURS: list[str] = VOCABULARY["attributes"]["colour"]
STYLES: list[str] = VOCABULARY["attributes"]["style"]
TEMPLATES: list[str] = VOCABULARY["templates"]["train"] + VOCABULARY["templates"]["eval"]

RGB = {
    "red": (215, 40, 40),
    "green": (45, 160, 60),
    "blue": (40, 75, 210),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 170),
    "orange": (240, 130, 30),
    "cyan": (60, 205, 215),
    "pink": (245, 140, 185),
}
CANVAS, SIZE = 256, 64
_Y, _X = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """One image: its three attributes and where and how the shape stands on the 256-pixel canvas."""

    shape: str
    colour: str
    style: str
    x: float
    y: float
    radius: float
    tilt: float  # radians
    jitter: tuple[int, int, int]  # added to the color's RGB


def random_scene(rng: np.random.Generator, calm: bool = False, **fixed: str) -> Scene:
    """A scene with random attributes (save those in `fixed`), size, place and tilt; `calm` narrows these three."""
    spread = 0.5 if calm else 1.0
    radius = float(rng.uniform(84 - 32 * spread, 84))
    room = spread * (CANVAS / 2 - radius - 12)
    names = {
        "shape": SHAPES[rng.integers(len(SHAPES))],
        "colour": COLOURS[rng.integers(len(COLOURS))],
        "style": STYLES[rng.integers(len(STYLES))],
    } | fixed
    r, g, b = (int(v) for v in rng.integers(-10, 11, 3))
    return Scene(
        **names,
        x=CANVAS / 2 + float(rng.uniform(-room, room)),
        y=CANVAS / 2 + float(rng.uniform(-room, room)),
        radius=radius,
        tilt=spread * float(rng.uniform(-0.35, 0.35)),
        jitter=(r, g, b),
    )


def caption(scene: Scene, rng: np.random.Generator, complete: bool = False) -> str:
    """A caption from a random template; color is omitted in 10 % and style in 15 % unless `complete`."""
    text = TEMPLATES[rng.integers(len(TEMPLATES))]
    drop_colour, drop_style = rng.random() < 0.10, rng.random() < 0.15
    if not complete and drop_style:
        for phrase in (", {style} style", " in {style} style", "{style} "):
            text = text.replace(phrase, "")
    if not complete and drop_colour:
        text = text.replace("{colour} ", "")
    return text.format(shape=scene.shape, colour=scene.colour, style=scene.style)


def _polygon(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)


def _outline(shape: str) -> np.ndarray:
    """The shape's border as points in a unit circle, upright (y down)."""
    turn = np.linspace(0, 2 * np.pi, 73)[:-1]
    if shape in ("circle", "ring", "crescent"):
        return _polygon(turn, 1.0)
    if shape == "square":
        return _polygon(np.pi / 4 + np.arange(4) * np.pi / 2, 1.1)
    if shape == "triangle":
        return _polygon(np.arange(3) * 2 * np.pi / 3, 1.15) + [0, 0.15]
    if shape == "star":
        return _polygon(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.15))
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x / 16, -y / 16], axis=1)
    if shape == "cross":
        a, b = 0.36, 1.05
        return np.array(
            [(a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a), (-a, -b), (a, -b), (a, -a), (b, -a), (b, a)]
        )
    raise ValueError(f"no shape named {shape!r}")


def _silhouette(scene: Scene) -> Image.Image:
    """The shape as a mask on the canvas, 255 inside."""
    cos, sin = np.cos(scene.tilt), np.sin(scene.tilt)
    place = lambda points: [  # noqa: E731
        (scene.x + scene.radius * (cos * px - sin * py), scene.y + scene.radius * (sin * px + cos * py))
        for px, py in points
    ]
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw = ImageDraw.Draw(mask)
    draw.polygon(place(_outline(scene.shape)), fill=255)
    if scene.shape == "ring":
        draw.polygon(place(_outline("circle") * 0.55), fill=0)
    if scene.shape == "crescent":
        draw.polygon(place(_outline("circle") * 0.85 + [0.5, -0.12]), fill=0)
    return mask


def _ground(style: str, rng: np.random.Generator, calm: bool) -> np.ndarray:
    """The image's ground, (256, 256, 3) floats in 0…255; `calm` stripes all lean alike."""
    if style == "sketch":
        return _flat(np.array([250, 243, 222]) + rng.integers(-5, 6))
    if style == "night":
        return _flat(np.array([16, 16, 34]) + rng.integers(-6, 7))
    grey = float(rng.integers(165, 200))
    if style == "plain":
        return _flat(np.full(3, grey))
    if style == "striped":
        angle, phase = np.float32(0.8 if calm else rng.uniform(0.5, 1.1)), np.float32(rng.uniform(0, 48))
        dark = (_X * np.cos(angle) + _Y * np.sin(angle) + phase) % 48 < 22
    elif style == "dotted":
        px, py = rng.uniform(0, 48, 2).astype(np.float32)
        dark = ((_X + px) % 48 - 24) ** 2 + ((_Y + py) % 48 - 24) ** 2 < 14**2
    else:
        raise ValueError(f"no style named {style!r}")
    level = np.where(dark, np.float32(0.6 * grey), np.float32(min(1.1 * grey, 255)))
    return np.repeat(level[..., None], 3, axis=2)


def _flat(colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.clip(colour, 0, 255).astype(np.float32), (CANVAS, CANVAS, 3))


def draw(scene: Scene, rng: np.random.Generator, calm: bool = False) -> np.ndarray:
    """The image of a scene: uint8, (64, 64, 3). `rng` draws the ground's own variation."""
    mask = _silhouette(scene)
    rgb = np.clip(np.array(RGB[scene.colour]) + np.array(scene.jitter), 0, 255).astype(np.float32)
    picture = _ground(scene.style, rng, calm)
    inside = np.asarray(mask, dtype=np.float32)[..., None] / 255
    if scene.style == "sketch":
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(9)), dtype=np.float32)[..., None] / 255
        inside = inside * np.where(soft < 0.93, np.float32(1), np.float32(0.35))  # an outline around a light wash
    if scene.style == "night":
        glow = np.asarray(mask.filter(ImageFilter.GaussianBlur(16)), dtype=np.float32)[..., None] / 255
        picture = picture + 0.55 * glow * rgb
        rgb = np.clip(rgb * 1.12 + 8, 0, 255)
    picture = np.clip(picture * (1 - inside) + rgb * inside, 0, 255)
    factor = CANVAS // SIZE
    small = picture.reshape(SIZE, factor, SIZE, factor, 3).mean(axis=(1, 3))
    return np.round(small).astype(np.uint8)


@dataclass(frozen=True)
class Pictures:
    """images: uint8 (n, 64, 64, 3); labels: int64 (n, 3) indices of shape, color, style; captions: n strings."""

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]


def make(n: int, seed: int, calm: bool = False) -> Pictures:
    """n images with labels and captions, the same for the same seed."""
    rng = np.random.default_rng(seed)
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    labels = np.empty((n, 3), np.int64)
    captions = []
    for i in range(n):
        scene = random_scene(rng, calm)
        images[i] = draw(scene, rng, calm)
        labels[i] = SHAPES.index(scene.shape), COLOURS.index(scene.colour), STYLES.index(scene.style)
        captions.append(caption(scene, rng))
    return Pictures(images, labels, captions)
