"""Pictures of the user's own as training data: read with care, told what was left out, encoded once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.cache import Cache, key_of
from salun.diffusion.denoiser import DiffusionModel
from salun.errors import DataError, some
from salun.progress import Event, Progress, silent
from salun.user_text import as_spelled, prompt_text, syntax_note

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
# named, so that a file of another kind under such a name starts no other program (EPS would start Ghostscript)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
_LONGEST_CAPTION = 2000  # characters


@dataclass(frozen=True)
class Encoded:
    """A folder's pictures as latents.

    latents: float32 (n, c, h, w), scaled, on the model's device. captions: what x.txt beside each x.png says, or None.
    notes: lines for the user: what was used, left out and why.
    """

    latents: Tensor
    captions: list[str | None]
    notes: list[str]


def picture_files(folder: Path) -> list[Path]:
    """The picture files in a folder and the folders in it, sorted. Raises DataError if there are none."""
    try:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): name a folder of pictures") from error
    if not found:
        what = "holds no pictures" if folder.is_dir() else "is no folder"
        raise DataError(f"{folder} {what}: name a folder with {', '.join(SUFFIXES)} files")
    return found


def folder_digest(folder: Path) -> str:
    """A hash of a folder's pictures and captions: what a run that uses them depends on."""
    digest = hashlib.sha256()
    for path in picture_files(folder):
        for file in (path, path.with_suffix(".txt")):
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def encode_folder(
    model: DiffusionModel,
    folder: Path,
    progress: Progress = silent,
    cache: Cache | None = None,
    stage: str = "encoding",
) -> Encoded:
    """Every usable picture of a folder once, cut to its central square at the model's resolution.

    Turned as the camera held it, transparency on white, grey and CMYK as RGB, of an animation the first frame. Left out
    and named: files that cannot be read, pictures of less than a quarter of the resolution, and repeated ones. Smaller
    pictures are enlarged, and counted. Raises DataError if nothing is left.
    """
    side = model.settings.sampling.resolution
    files = picture_files(folder)
    latents, captions, seen = [], [], set()
    left: dict[str, list[str]] = {}
    for step, path in enumerate(files, 1):
        progress(Event(stage, step, len(files)))
        name = path.relative_to(folder).as_posix()
        try:
            pixels, traits = _read(path, side)
        except DataError as error:
            left.setdefault(str(error), []).append(name)
            continue
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest in seen:
            left.setdefault("repeated, left out", []).append(name)
            continue
        seen.add(digest)
        for trait in traits:
            left.setdefault(trait, []).append(name)
        latents.append(_encode(model, pixels, digest, cache))
        captions.append(_fitting(model, _caption(path), name))
    notes = [f"{folder.name}: {len(latents)} of {len(files)} pictures used"]
    notes += [f"  {len(names)} {why}: {some(names, 5)}" for why, names in left.items()]
    notes += [f"  captions: {note}" for note in syntax_note(text for text in captions if text)]
    if not latents:
        raise DataError("; ".join(line.strip() for line in notes) + ": nothing is left to train on")
    return Encoded(torch.stack(latents).to(model.device), captions, notes)


def _encode(model: DiffusionModel, pixels: np.ndarray, digest: str, cache: Cache | None) -> Tensor:
    key = key_of(
        what="picture",
        picture=digest,
        shape=pixels.shape,
        vae=model.vae_hash,
        device=model.device.type,
        torch=torch.__version__,
    )
    kept = cache.get(key) if cache is not None else None
    if kept is None:
        kept = {"latent": model.encode_pictures(pixels[None])[0].cpu()}
        if cache is not None:
            cache.put(key, kept)
    return kept["latent"]


def _read(path: Path, side: int) -> tuple[np.ndarray, list[str]]:
    """uint8 (side, side, 3), and what was done to it that a user should know. Raises DataError saying why not."""
    from PIL import Image, ImageOps

    traits = []
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=known) as image:
                if getattr(image, "n_frames", 1) > 1:
                    traits.append("animated, first frame taken")
                    image.seek(0)
                upright = _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("too large, left out") from error
    except Exception as error:  # a damaged file can raise nearly anything from within its decoder
        phone = path.suffix.lower() in (".heic", ".heif")
        hint = " (salun reads no HEIC: export them as JPEG)" if phone else ""
        raise DataError("unreadable, left out" + hint) from error
    short = min(upright.size)
    if short * 4 < side:
        raise DataError(f"tiny (less than {-(-side // 4)} pixels), left out")
    if short < side:
        traits.append(f"enlarged to {side} pixels")
    return square(upright, side), traits


def square(picture: Any, side: int) -> np.ndarray:
    """The central square of a PIL picture in RGB at this side: uint8 (side, side, 3)."""
    from PIL import Image, ImageOps

    return np.array(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # deep grey: PIL's own conversion would cut it off
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) / top * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def _caption(path: Path) -> str | None:
    """The text beside a picture, on one line; None where there is none."""
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None
    return prompt_text(" ".join(text[:_LONGEST_CAPTION].split())) or None


def _fitting(model: DiffusionModel, caption: str | None, name: str) -> str | None:
    try:
        model.chunks(caption or "")
    except DataError as error:
        raise DataError(f"the caption of {name}: {error}") from error
    return caption


def concept_folders(folder: Path, names: list[str]) -> Iterator[Path]:
    """The folder of each concept's pictures: the folder itself for one concept, else the one of its name in it."""
    if len(names) == 1:
        yield folder
        return
    for name in names:
        own = as_spelled(folder / name)
        if Path(name).name != name or not own.is_dir():
            raise DataError(f"--forget-images {folder} holds no folder {name!r}: several concepts need one each")
        yield own
