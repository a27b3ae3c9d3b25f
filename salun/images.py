"""Untrusted image files: which files of a folder are images, and each image as upright pixels of 8 bits.

Formats come from a list, so that a file starts no other program (an EPS would start Ghostscript) whatever its name. Its
size is read from the header before memory is taken for its pixels.

Gray images of 16 bits often hold values of 8, 10 or 12 bits and would come out black. So the images of one data set or
folder are scaled together: white is the largest value of the fewest bits (8, 10, 12 or 16) that hold all their values.
(Color of 16 bits is scaled by Pillow, which keeps the upper 8.)
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salun.errors import DataError, some

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "QOI", "SGI", "PCX", "AVIF", "HEIF",
    "TGA",
)  # fmt: skip
HEIF_SUFFIXES = {".heic", ".heif"}  # of telephones; Pillow reads them with the package pillow-heif only
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")  # an MPO's or HEIF's further images are other views of the first
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
ORIENTATION = 0x0112  # of EXIF
MOST_PIXELS = 2**26  # 8192 × 8192; an image in memory has up to 8 bytes per pixel
MOST_BYTES = 2**30  # of a file
TOO_LARGE = f"too large (the limit is {MOST_PIXELS:,} pixels)"
WHITES = (255, 1023, 4095, 65535)
NOT_AN_IMAGE = "not an image"
LFS = b"version https://git-lfs"  # begins a file that stands for another
_STRIP = 2**22  # pixels that are laid on white at once

Source = Path | bytes


@dataclass(frozen=True)
class Listing:
    """files: the image files, sorted. skipped: reason → the other files' names, relative to the folder."""

    files: list[Path]
    skipped: dict[str, list[str]]


@cache
def suffixes() -> frozenset[str]:
    """File name suffixes of the formats that are read, and of HEIF, so that it is never skipped in silence."""
    from PIL import Image

    Image.init()
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in FORMATS) | HEIF_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to a system or program rather than to the user's data."""
    return name.startswith(".") or name.casefold() in SYSTEM


def visible_folders(folder: Path) -> list[str]:
    """Names of the sub-folders and linked sub-folders that are not hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def list_images(folder: Path, deep: bool = True) -> Listing:
    """The image files in a folder and the folders in it, linked ones too, each folder once.

    deep: whether the folders in it are entered; hidden ones count as skipped either way.
    Raises DataError if the folder cannot be read.
    """
    files: list[Path] = []
    skipped: dict[str, list[str]] = {}

    def skip(reason: str, path: Path) -> None:
        skipped.setdefault(reason, []).append(shown(path, folder))

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise DataError(f"{folder} cannot be read ({error.strerror})", advice="Give a folder of images") from error
        skip("folder cannot be read", Path(error.filename))

    real = folder.resolve()
    visited = {real, *real.parents}  # a link upwards would lead to the images of other classes
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here, entered = Path(root), []
        for name in sorted(folders):
            if is_hidden(name):
                for path in _files_below(here / name):
                    skip("hidden or system file", path)
            elif not deep:
                continue
            elif (real := (here / name).resolve()) in visited:
                skip("linked folder that is read already", here / name)
            else:
                visited.add(real)
                entered.append(name)
        folders[:] = entered
        for name in sorted(names):  # so that sorting all of them below is quick
            path = here / name
            reason = _why_not(path, name)
            if reason is None:
                files.append(path)
            else:
                skip(reason, path)
    return Listing(sorted(files), {reason: sorted(names) for reason, names in sorted(skipped.items())})


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _why_not(path: Path, name: str) -> str | None:
    """Why a file is not read as an image, None if it is."""
    if is_hidden(name):
        return "hidden or system file"
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return "broken link, pipe or device"
    if not stat.S_ISREG(facts.st_mode):
        return "broken link, pipe or device"
    if path.suffix.lower() not in suffixes():
        return NOT_AN_IMAGE
    return f"larger than {MOST_BYTES // 2**20} MiB" if facts.st_size > MOST_BYTES else None


def shown(path: Path, folder: Path) -> str:
    """A file's name relative to a folder, as text that can be written anywhere."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")


def counted(reasons: dict[str, list[str]], most: int = 3) -> list[str]:
    """A line for each reason: how many files, why, and the first names."""
    return [f"{len(names)} {why}: {some(names, most)}" for why, names in reasons.items() if names]


def read_image(source: Source, white: Callable[[], int]) -> tuple[Image, list[str]]:
    """An image as the camera held it, in mode L or RGB, transparency on white; of several frames the first.

    Args:
        source: an image file, or its content.
        white: gives the value that is white in 16 bits (see `white_level`); called for such images only.

    Returns:
        The image, and what a user should know of it.

    Raises:
        DataError: says why it cannot be used, without its name.
    """
    from PIL import Image, ImageOps

    with _opened(source) as image:
        traits = []
        if image.format in ANIMATED and getattr(image, "is_animated", False):
            traits.append("animated, first frame taken")
            image.seek(0)
        elif image.format == "TIFF" and getattr(image, "is_animated", False):
            traits.append("of several pages, first page taken")
        image.load()
        turned = image.getexif().get(ORIENTATION, 1) != 1  # without `in_place`, which A1111's and Forge's Pillow lacks
        upright = ImageOps.exif_transpose(image) if turned else image
        if upright.mode.startswith("I"):
            values, top = _deep(upright), white()
            if top < WHITES[-1]:
                traits.append(f"of 16 bits, scaled from 0 to {top}")
            scale = (np.arange(2**16) * 255 // top).clip(0, 255).astype(np.uint8)
            return Image.fromarray(scale[values]), traits
        return _flat(upright), traits


def white_level(sources: Iterable[Source]) -> int:
    """The value that is white in the gray images of 16 bits among these; 65535 without such images."""
    highest = 0
    for source in sources:
        with suppress(DataError), _opened(source) as image:
            if image.mode.startswith("I"):
                highest = max(highest, int(_deep(image).max(initial=0)))
    return next(white for white in WHITES if highest <= white) if highest else WHITES[-1]


@contextmanager
def _opened(source: Source) -> Iterator[Image]:
    """Context manager: Pillow's image, of which only the header is read. Any error inside becomes a DataError."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    heif = isinstance(source, Path) and source.suffix.lower() in HEIF_SUFFIXES and "HEIF" not in known
    if isinstance(source, Path) and not source.is_file():
        raise DataError("not a file")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # such as of damaged EXIF data, without the file's name
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=known) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(TOO_LARGE)
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise DataError("unreadable" + (" (HEIC: export it as JPEG)" if heif else _pointer(source))) from error
    except Exception as error:  # a damaged file can raise nearly anything from within its decoder
        raise DataError("unreadable") from error


def _pointer(source: Source) -> str:
    """What a user should do about a file of which Git LFS has not fetched the content; nothing for others."""
    if isinstance(source, bytes):
        return ""
    with source.open("rb") as file:
        return " (a Git LFS pointer: run `git lfs pull`)" if file.read(len(LFS)) == LFS else ""


def _deep(image: Image) -> np.ndarray:
    """uint16 (h, w)."""
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min(initial=0) < 0 or values.max(initial=0) > WHITES[-1]):
        raise DataError("of 32 bits per pixel (save it with 8 or 16)")
    return values.astype(np.uint16)


def _flat(image: Image) -> Image:
    """In mode L or RGB; transparency on white, in strips, since each step takes memory for all of its pixels."""
    from PIL import Image as images

    if image.mode == "F":
        raise DataError("of floats, whose range is not known (save it with 8 or 16 bits)")
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image if image.mode == mode else image.convert(mode)
    flat, rows = images.new(mode, image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        laid = images.alpha_composite(images.new("RGBA", strip.size, "white"), strip)
        flat.paste(laid.convert(mode), (0, top))
    return flat


def read_images(
    sources: Sequence[tuple[Source, str]], where: str, size: int | None = None
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """A data set's images, one at a time.

    Args:
        sources: each with its name in messages.
        where: the data set, in messages.
        size: pixels a side to which they are resized.

    Yields:
        The pixels, uint8 (h, w) for gray, (h, w, 3) for color, and what a user should know of the image.

    Raises:
        DataError: an image cannot be read, or their sizes differ where none is given.
    """
    from PIL import Image

    white = cache(lambda: white_level(source for source, _ in sources))
    shape: tuple[int, ...] | None = None
    for source, name in sources:
        try:
            image, traits = read_image(source, white)
        except DataError as error:
            raise DataError(f"{name} cannot be read as an image: {error}", advice="Fix or remove it") from error
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        shape = shape or pixels.shape[:2]
        if pixels.shape[:2] != shape:
            (h, w), (high, wide) = shape, pixels.shape[:2]
            raise DataError(
                f"{where} has images of different sizes ({w}×{h} and {wide}×{high}, width × height)",
                advice="Choose one size by {image_size}",
            )
        yield pixels, traits
