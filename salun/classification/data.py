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
from salun.classification.labeled import ImageData, given_parts
from salun.classification.options import TrainOptions
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
    name: str,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    data_config: str | None = None,
    split: str | None = None,
) -> ImageData:
    """The data set of a name: `digits`, `clutter`, a preset, a folder (see `_from_folder`), or a hub id.

    image_size: pixels a side to which images are resized. image_column, label_column: of a table, or of a Hugging Face
    data set without a preset. data_config: a configuration on the hub, or a folder in the folder. split: as of
    `given_parts`. Raises DataError if it does not exist or cannot be used, ConfigError for an option that `digits` or
    `clutter` do not have, or an invalid split.
    """
    known, others = presets()["datasets"], presets()["others"]
    if name in EMBEDDED:
        _check_embedded(name, image_size=image_size, data_config=data_config, split=split)
        return replace(EMBEDDED[name](), preset=known[name])
    given = {"image": image_column, "label": label_column, "config": data_config, "split": given_parts(split)}
    given = {key: value for key, value in given.items() if value}
    if name in known:
        return from_hub(name, known[name] | given, image_size)
    path = as_spelled(Path(name).expanduser())
    if path.is_dir():
        return _from_folder(name, path, others | given, image_size)
    if name.count("/") == 1:
        return from_hub(name, others | {"repo": name} | given, image_size)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"give a folder, a hub id, or one of {', '.join(known)}"
    raise DataError(f"there is no data set {name!r}: {hint}")


def data_of(options: TrainOptions) -> ImageData:
    """The data set that options name. Raises as `load_data`."""
    return load_data(*arguments_of(options))


def arguments_of(options: TrainOptions) -> tuple[Any, ...]:
    """The arguments of `load_data` that options give."""
    columns = options.image_column, options.label_column
    return options.data, options.image_size, *columns, options.data_config, options.split


def _check_embedded(name: str, **options: Any) -> None:
    """Raises ConfigError for an option that an embedded data set does not have."""
    why = {"image_size": f"the images of {name} are not resized"}
    for option, value in options.items():
        if value is not None:
            reason = why.get(option, f"{name} has none")
            raise ConfigError(f"is {value}, but {reason}", option=option, advice="Omit it")


def _from_folder(name: str, path: Path, preset: dict[str, Any], image_size: int | None) -> ImageData:
    """A folder that `save_to_disk` wrote, a clone of a hub's repository, or images in a folder for each class."""
    config = preset.get("config")
    if config and not is_saved(path) and (path / config).is_dir():
        path, preset = path / config, {key: value for key, value in preset.items() if key != "config"}
    elif config and not is_saved(path) and not parquet_files(path):
        raise DataError(f"is {config!r}, but {path} has no such folder", option="data_config")
    try:
        if is_saved(path):
            return from_hub(name, preset | {"repo": str(path)}, image_size)
        tables = tables_in(path)
        unused: UnusedTable | None = None
        if tables:
            result = from_tables(path, tables, image_size, preset)
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
