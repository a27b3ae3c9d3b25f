"""Data sets by name: digits, clutter, a folder of images, any Hugging Face image data set."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salun.classification import clutter
from salun.classification.folders import from_folder
from salun.classification.hub import from_hub, is_saved, parquet_files
from salun.classification.labeled import ImageData
from salun.classification.tables import UnusedTable, from_tables, tables_in
from salun.errors import ConfigError, DataError
from salun.extras import install_command
from salun.images import list_images
from salun.untrusted import read_yaml
from salun.user_text import as_spelled

__all__ = ["EMBEDDED", "ImageData", "load_data", "presets"]


@cache
def presets() -> dict[str, Any]:
    """The data sets known by name, and under "others" the settings of all other data."""
    path = Path(__file__).resolve().parents[1] / "assets" / "datasets.yaml"
    entries: dict[str, Any] = read_yaml(path)
    return entries


def load_data(
    name: str, image_size: int | None = None, image_column: str | None = None, label_column: str | None = None
) -> ImageData:
    """The data set of a name: `digits`, `clutter`, a preset, a folder (see `_from_folder`), or a hub id.

    image_size: pixels a side to which images are resized. image_column, label_column: of a table, or of a Hugging Face
    data set without a preset. Raises DataError if it does not exist or cannot be used, ConfigError for a size of
    `digits` or `clutter`.
    """
    known, others = presets()["datasets"], presets()["others"]
    if name in EMBEDDED:
        if image_size is not None:
            raise ConfigError(
                f"is {image_size}, but the images of {name} are not resized", option="image_size", advice="Omit it"
            )
        return replace(EMBEDDED[name](), preset=known[name])
    columns = {key: value for key, value in (("image", image_column), ("label", label_column)) if value}
    if name in known:
        return from_hub(name, known[name] | columns, image_size)
    path = as_spelled(Path(name).expanduser())
    if path.is_dir():
        return _from_folder(name, path, others | columns, image_size)
    if name.count("/") == 1:
        return from_hub(name, others | {"repo": name} | columns, image_size)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"give a folder, a hub id, or one of {', '.join(known)}"
    raise DataError(f"there is no data set {name!r}: {hint}")


def _from_folder(name: str, path: Path, preset: dict[str, Any], image_size: int | None) -> ImageData:
    """A folder that `save_to_disk` wrote, a clone of a hub's repository, or images in a folder for each class."""
    try:
        if is_saved(path):
            return from_hub(name, preset | {"repo": str(path)}, image_size)
        tables = tables_in(path)
        unused: UnusedTable | None = None
        if tables:
            result = from_tables(path, tables, image_size, preset, preset.get("image"), preset.get("label"))
            if isinstance(result, ImageData):
                return result
            unused = result
        if parquet_files(path) and not list_images(path).files:
            data = from_hub(name, preset | {"repo": str(path)}, image_size)
        else:
            data = _from_class_folders(path, image_size, preset, unused)
        return replace(data, notes=(*data.notes, unused.note)) if unused is not None else data
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _from_class_folders(
    path: Path, image_size: int | None, preset: dict[str, Any], unused: UnusedTable | None
) -> ImageData:
    """As `from_folder`; its errors also name the table that is not used, and the option that may make it of use."""
    try:
        return from_folder(path, image_size, preset)
    except DataError as error:
        if unused is None:
            raise
        message, advice = f"{error.message}; {unused.note}", f"Name the table's column by {{{unused.option}}}"
        raise DataError(message, option=error.option, advice=advice) from error


def _digits() -> ImageData:
    """1,797 images (1, 8, 8): pixels of 0 to 16, times 15."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set digits needs scikit-learn", advice=install_command("classification")) from error
    digits = load_digits()
    images = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)
    return ImageData("digits", images, torch.from_numpy(digits.target).long(), tuple("0123456789"))


def _clutter() -> ImageData:
    """2,000 images (1, 12, 12), see `clutter.py`."""
    images, labels = clutter.draw()
    return ImageData("clutter", torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels), clutter.CLASSES)


EMBEDDED = {"digits": _digits, "clutter": _clutter}  # those that need no download
