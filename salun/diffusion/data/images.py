"""The user's own images as training data: read as untrusted input, skipped files reported, each encoded once."""

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
from salun.user_text import as_spelled, composed, prompt_text, syntax_note

_LONGEST_CAPTION = 2000  # characters


@dataclass(frozen=True)
class EncodedImages:
    """A folder's images as latents.

    latents: float32 (n, c, h, w), scaled, on the model's device. captions: the text of x.txt for each x.png, or None.
    notes: lines for the user: what was used, what was skipped and why. digests: of the images' pixels, as encoded.
    """

    latents: Tensor
    captions: list[str | None]
    notes: list[str]
    digests: frozenset[str] = frozenset()


def image_files(folder: Path) -> Listing:
    """The image files in a folder and its subfolders. Raises DataError for a folder without images."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: choose a folder of images")
    listing = list_images(folder)
    captions = {shown(path.with_suffix(".txt"), folder) for path in listing.files}
    skipped = {**listing.skipped}
    skipped[NOT_AN_IMAGE] = [name for name in skipped.get(NOT_AN_IMAGE, []) if name not in captions]
    if not listing.files:
        others = "".join(f"; skipped: {line}" for line in counted(skipped))
        raise DataError(f"{folder} has no images: choose a folder of PNG, JPEG, WebP or other image files{others}")
    return Listing(listing.files, skipped)


def folder_digest(folder: Path) -> str:
    """A hash of a folder's images and captions: what a run that uses them depends on."""
    digest = hashlib.sha256()
    for path in image_files(folder).files:
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
    """Every usable image of a folder once, cropped to its central square at the model's resolution.

    EXIF orientation is applied, transparency becomes white, grayscale and CMYK become RGB, an animation gives its first
    frame. Skipped and reported: files that cannot be read, images of less than a quarter of the resolution, duplicates.
    Smaller images are enlarged, and counted. Of a class-conditional model an image without a caption has its folder's
    name, if that is a label. Raises DataError if nothing is left.
    """
    side = model.settings.sampling.resolution
    listing = image_files(folder)
    files, white = listing.files, cache_of(lambda: white_level(listing.files))
    latents, captions, seen = [], [], set()
    remarks: dict[str, list[str]] = {}
    for step, path in enumerate(files, 1):
        progress(Event(stage, step, len(files)))
        name = shown(path, folder)
        try:
            pixels, traits = _read(path, side, white)
        except DataError as error:
            remarks.setdefault(f"{error}, skipped", []).append(name)
            continue
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest in seen:
            remarks.setdefault("duplicates, skipped", []).append(name)
            continue
        seen.add(digest)
        if model.latent_shape[0] == 1 and (pixels != pixels[..., :1]).any():
            traits.append("made gray, as the model's images are")
        for trait in traits:
            remarks.setdefault(trait, []).append(name)
        latents.append(_encode(model, pixels, digest, cache))
        captions.append(_checked_caption(model, _caption(path) or _label(model, path), name))
    notes = [f"{folder.name}: {len(latents)} of {len(files)} images used"]
    remarks |= {f"{why}, skipped": names for why, names in listing.skipped.items()}
    notes += [f"  {line}" for line in counted(remarks, 5)]
    notes += [f"  captions: {note}" for note in syntax_note(text for text in captions if text)]
    if not latents:
        raise DataError("; ".join(line.strip() for line in notes) + ": nothing is left to train on")
    return EncodedImages(torch.stack(latents).to(model.device), captions, notes, frozenset(seen))


def _encode(model: DiffusionModel, pixels: np.ndarray, digest: str, cache: Cache | None) -> Tensor:
    key = key_of(
        what="image",
        image=digest,
        shape=[pixels.shape, model.latent_shape],
        vae=model.vae_hash,
        device=model.device.type,
        torch=torch.__version__,
    )
    entry = cache.get(key) if cache is not None else None
    if entry is None:
        entry = {"latent": model.encode_images(pixels[None])[0].cpu()}
        if cache is not None:
            cache.put(key, entry)
    return entry["latent"]


def _read(path: Path, side: int, white: Callable[[], int]) -> tuple[np.ndarray, list[str]]:
    """uint8 (side, side, 3), and what a user should know of its conversion. Raises DataError for an unusable image."""
    image, traits = read_image(path, white)
    short = min(image.size)
    if short * 4 < side:
        raise DataError(f"tiny (less than {-(-side // 4)} pixels)")
    if short < side:
        traits.append(f"enlarged to {side} pixels")
    return square(image.convert("RGB") if image.mode == "L" else image, side), traits


def square(image: Any, side: int) -> np.ndarray:
    """The central square of a PIL image in RGB, resized to uint8 (side, side, 3)."""
    from PIL import Image, ImageOps

    return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def _caption(path: Path) -> str | None:
    """The text of an image's .txt file, on one line; None without such a file."""
    text = read_start(path.with_suffix(".txt"), _LONGEST_CAPTION)
    return prompt_text(" ".join(text.split())) or None if text is not None else None


def _label(model: DiffusionModel, path: Path) -> str | None:
    """Of a class-conditional model, the label that an image's folder is named by."""
    vocabulary, name = model.settings.vocabulary, composed(path.parent.name)
    return name if model.settings.labels and vocabulary is not None and vocabulary.attribute_of(name) else None


def _checked_caption(model: DiffusionModel, caption: str | None, name: str) -> str | None:
    try:
        model.chunks(caption or "")
    except DataError as error:
        raise DataError(f"the caption of {name}: {error}") from error
    return caption


def concept_folders(folder: Path, names: list[str]) -> Iterator[Path]:
    """The folder of each concept's images: the folder itself for one concept, else its subfolder of that name."""
    if len(names) == 1:
        yield folder
        return
    for name in names:
        subfolder = as_spelled(folder / name)
        if Path(name).name != name or not subfolder.is_dir():
            raise DataError(
                f"{folder} has no subfolder {name!r}", option="forget_images", advice="Several concepts need one each"
            )
        yield subfolder
