"""Images for people: before/after grids, sheets of samples with captions, and a mask's density."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from salun.delta.stock_formats import group_of
from salun.report.density import summed

SHOWN = 320  # pixels of an image on a page
TILE, GAP, INK, PAPER = 128, 8, (40, 40, 46), (250, 250, 250)


def grid(before: np.ndarray, after: np.ndarray, captions: Sequence[str], blur: bool = False) -> np.ndarray:
    """One column per prompt: the image before over the image after, the prompt below.

    before, after: uint8 (n, h, w, 3), n > 0. Returns uint8 (H, W, 3). blur: make the scene unrecognizable.
    """
    rows = [("before", before), ("after", after)]
    left, lines = 56, 3
    width = left + len(before) * (TILE + GAP)
    height = GAP + 2 * (TILE + GAP) + lines * 14 + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(11)
    for r, (label, images) in enumerate(rows):
        top = GAP + r * (TILE + GAP)
        draw.text((GAP, top + TILE // 2 - 6), label, INK, font)
        for c, image in enumerate(images):
            sheet.paste(_tile(image, blur), (left + c * (TILE + GAP), top))
    for c, text in enumerate(captions):
        top = GAP + len(rows) * (TILE + GAP)
        for k, line in enumerate(_wrap(draw, font, text, TILE, lines)):
            draw.text((left + c * (TILE + GAP), top + 14 * k), line, INK, font)
    return np.asarray(sheet)


def sheet(images: np.ndarray, columns: int, captions: Sequence[str], blur: Sequence[bool] = ()) -> np.ndarray:
    """Rows of `columns` images, each row under its caption.

    images: uint8 (rows·columns, h, w, 3). blur: of each row, whether to make its images unrecognizable; none by
    default.
    """
    rows = -(-len(images) // columns)
    side = max(TILE, images.shape[1])
    page = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP + 18) + GAP), PAPER)
    draw, font = ImageDraw.Draw(page), _font(12)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = GAP + row * (side + GAP + 18)
        if column == 0 and row < len(captions):
            line = _wrap(draw, font, captions[row], page.width - 2 * GAP, 1)
            draw.text((GAP, top), line[0] if line else "", INK, font)
        page.paste(_tile(image, bool(blur) and blur[row], side), (GAP + column * (side + GAP), top + 18))
    return np.asarray(page)


def stack(*images: np.ndarray) -> np.ndarray:
    """Images one below the other, on a background as wide as the widest."""
    width = max(p.shape[1] for p in images)
    padded = [
        np.concatenate([p, np.full((p.shape[0], width - p.shape[1], 3), PAPER, np.uint8)], axis=1) for p in images
    ]
    return np.concatenate(padded)


def densities(counts: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """A mask's density by block (down) and kind of layer (across): white for none, dark for all.

    counts: parameter → (selected, all entries). Returns uint8 (H, W, 3).
    """
    sums = summed(counts, group_of)
    blocks = list(dict.fromkeys(group.split(" ", 1)[0] for group in sums))
    kinds = sorted({group.split(" ", 1)[1] for group in sums})
    left, top, width, height = 120, 40, 92, 30
    sheet = Image.new("RGB", (left + width * len(kinds) + GAP, top + height * len(blocks) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for c, kind in enumerate(kinds):
        draw.text((left + c * width + 4, top - 20), kind, INK, font)
    for r, block in enumerate(blocks):
        draw.text((GAP, top + r * height + 8), block, INK, font)
        for c, kind in enumerate(kinds):
            selected, total = sums.get(f"{block} {kind}", (0, 0))
            if total:
                fraction = selected / total
                shade = tuple(round(255 + (end - 255) * fraction) for end in (28, 62, 120))
                box = (left + c * width, top + r * height, left + (c + 1) * width - 2, top + (r + 1) * height - 2)
                draw.rectangle(box, shade, (200, 200, 206))
                draw.text((box[0] + 8, box[1] + 7), f"{fraction:.1%}", PAPER if fraction > 0.5 else INK, font)
    return np.asarray(sheet)


def blurred(image: Image.Image, side: int = TILE) -> Image.Image:
    """A square image, reduced to 8×8 pixels and enlarged: the scene can neither be recognized nor be recovered."""
    return (
        image.resize((8, 8), Image.Resampling.BOX)
        .resize((side, side), Image.Resampling.BICUBIC)
        .filter(ImageFilter.GaussianBlur(8))
    )


def thumbnail(image: np.ndarray, blur: bool = False, side: int = SHOWN) -> bytes:
    """A uint8 image (h, w, 3) as JPEG, of at most `side` pixels a side."""
    small = Image.fromarray(image)
    if blur:
        small = blurred(small, side)
    elif max(small.size) > side:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    elif min(small.size) < side // 2:
        factor = side // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def png_bytes(image: np.ndarray) -> bytes:
    """A uint8 image (h, w, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile(image: np.ndarray, blur: bool, side: int = TILE) -> Image.Image:
    tile = Image.fromarray(image)
    if blur:
        return blurred(tile, side)
    small = image.shape[0] < side
    return tile.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; before Pillow 10.1, which WebUIs still have, it has a single size."""
    try:
        return ImageFont.load_default(size=size)
    except TypeError:
        return ImageFont.load_default()


def _wrap(draw: ImageDraw.ImageDraw, font: object, text: str, width: int, lines: int) -> list[str]:
    if isinstance(font, ImageFont.ImageFont):  # which has Latin letters only
        text = text.encode("latin-1", "replace").decode("latin-1")
    wrapped: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if draw.textlength(longer, font) <= width:  # type: ignore[arg-type]
            line = longer
            continue
        if line:
            wrapped.append(line)
        line = word
        while draw.textlength(line, font) > width and len(line) > 1:  # type: ignore[arg-type]
            line = line[:-1]
    wrapped.append(line)
    if len(wrapped) > lines:
        wrapped = wrapped[:lines]
        ending = "..." if isinstance(font, ImageFont.ImageFont) else "…"
        wrapped[-1] = wrapped[-1][: max(len(wrapped[-1]) - 1, 0)] + ending
    return wrapped
