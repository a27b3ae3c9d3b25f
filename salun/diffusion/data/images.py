"""Pictures of the user's own as training data: read with care, told what was left out, encoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as cache_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.model.protocol import DiffusionModel
from salun.errors import DataError
from salun.files import sha256_file
from salun.images import NOT_AN_IMAGE, Listing, counted, list_images, read_image, shown, white_level
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache, key_of
from salun.untrusted import read_start
from salun.user_text import as_spelled, prompt_text, syntax_note

_LONGEST_CAPTION = 2000  # characters


@dataclass(frozen=True)
class EncodedImages:
    """A folder's pictures as latents.

    latents: float32 (n, c, h, w), scaled, on the model's device. captions: what x.txt beside each x.png says, or None.
    notes: lines for the user: what was used, left out and why. digests: of the images' pixels, as they were encoded.
    """

    latents: Tensor
    captions: list[str | None]
    notes: list[str]
    digests: frozenset[str] = frozenset()


def picture_files(folder: Path) -> Listing:
    """The image files in a folder and the folders in it. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name a folder of images")
    found = list_images(folder)
    captions = {shown(path.with_suffix(".txt"), folder) for path in found.files}
    skipped = {**found.skipped}
    skipped[NOT_AN_IMAGE] = [name for name in skipped.get(NOT_AN_IMAGE, []) if name not in captions]
    if not found.files:
        others = "".join(f"; skipped: {line}" for line in counted(skipped))
        raise DataError(f"{folder} holds no pictures: name a folder of PNG, JPEG, WebP or other image files{others}")
    return Listing(found.files, skipped)


def folder_digest(folder: Path) -> str:
    """A hash of a folder's images and captions: what a run that uses them depends on."""
    digest = hashlib.sha256()
    for path in picture_files(folder).files:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
        digest.update(bytes.fromhex(sha256_file(path)))
        text = read_start(path.with_suffix(".txt"), _LONGEST_CAPTION)
        if text is not None:
            digest.update(os.fsencode(path.with_suffix(".txt").relative_to(folder).as_posix()) + b"\0")
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def encode_folder(
    model: DiffusionModel,
    folder: Path,
    progress: Progress = silent,
    cache: Cache | None = None,
    stage: Stage = Stage.ENCODING,
) -> EncodedImages:
    """Every usable picture of a folder once, cut to its central square at the model's resolution.

    Turned as the camera held it, transparency on white, grey and CMYK as RGB, of an animation the first frame. Left out
    and named: files that cannot be read, pictures of less than a quarter of the resolution, and repeated ones. Smaller
    pictures are enlarged, and counted. Raises DataError if nothing is left.
    """
    side = model.settings.sampling.resolution
    listing = picture_files(folder)
    files, white = listing.files, cache_of(lambda: white_level(listing.files))
    latents, captions, seen = [], [], set()
    left: dict[str, list[str]] = {}
    for step, path in enumerate(files, 1):
        progress(Event(stage, step, len(files)))
        name = shown(path, folder)
        try:
            pixels, traits = _read(path, side, white)
        except DataError as error:
            left.setdefault(f"{error}, left out", []).append(name)
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
    left |= {f"{why}, skipped": names for why, names in listing.skipped.items()}
    notes += [f"  {line}" for line in counted(left, 5)]
    notes += [f"  captions: {note}" for note in syntax_note(text for text in captions if text)]
    if not latents:
        raise DataError("; ".join(line.strip() for line in notes) + ": nothing is left to train on")
    return EncodedImages(torch.stack(latents).to(model.device), captions, notes, frozenset(seen))


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


def _read(path: Path, side: int, white: Callable[[], int]) -> tuple[np.ndarray, list[str]]:
    """uint8 (side, side, 3), and what was done to it that a user should know. Raises DataError saying why not."""
    image, traits = read_image(path, white)
    short = min(image.size)
    if short * 4 < side:
        raise DataError(f"tiny (less than {-(-side // 4)} pixels)")
    if short < side:
        traits.append(f"enlarged to {side} pixels")
    return square(image.convert("RGB") if image.mode == "L" else image, side), traits


def square(picture: Any, side: int) -> np.ndarray:
    """The central square of a PIL picture in RGB at this side: uint8 (side, side, 3)."""
    from PIL import Image, ImageOps

    return np.array(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))


def _caption(path: Path) -> str | None:
    """The text beside an image, on one line; None where there is none."""
    text = read_start(path.with_suffix(".txt"), _LONGEST_CAPTION)
    return prompt_text(" ".join(text.split())) or None if text is not None else None


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
