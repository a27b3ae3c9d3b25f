"""Hugging Face image data sets: from the hub, saved in a folder, or a clone of a hub's repository."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun.classification.labeled import NAME_PARTS, ROLES, ImageData, Sample, assembled, role_in, role_of, roles_of
from salun.errors import DataError, some
from salun.extras import install_command
from salun.images import LFS, Source, is_hidden
from salun.untrusted import read_json


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json"))


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in a folder and the folders in it, sorted."""
    paths = (path for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts)))


def from_hub(name: str, preset: dict[str, Any], image_size: int | None = None) -> ImageData:
    """A Hugging Face image data set.

    Args:
        name: of the data set, in messages.
        preset: repo (a hub id, or a folder: saved, or with parquet files), config, image and label (column names; found
            by their types where not given), and how to train.
        image_size: pixels a side to which images are resized.

    Raises:
        DataError: `datasets` is not installed, the data is not available, or has no images or labels; or as
        `assembled`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the data set {name!r} needs the package datasets", advice=install_command("datasets")
        ) from error
    splits, given = _splits(name, preset), preset.get("split", {})
    first = next((part for split, part in splits.items() if role_in(split, given) == "train"), None)
    if first is None:
        wanted, listed = given.get("train", "train"), ", ".join(map(str, splits))
        raise DataError(f"the data set {name!r} has no part named {wanted}, only {listed}", advice=NAME_PARTS)
    image = _column(name, "image", preset.get("image"), first.features, datasets.Image)
    label = _column(name, "label", preset.get("label"), first.features, datasets.ClassLabel)
    if not len(first):
        raise DataError(f"the data set {name!r} is empty: its part train has no image")
    used, notes, parts = {}, [], {}
    for split, part in splits.items():
        if image not in part.features or label not in part.features:
            notes.append(f"{name}: the part {split} has no column {image!r} or {label!r} and is not used")
            continue
        labels = [_label(value, f"{name}, {split}, row {i}", label) for i, value in enumerate(part[label])]
        missing = sum(value < 0 for value in labels)
        if missing:
            notes.append(f"{name}: skipped {missing} of {len(labels)} images of the part {split}: no label (−1)")
        if missing < len(labels):
            used[split] = (part, labels)
    if "train" not in {role_in(split, given) for split in used}:
        raise DataError(f"the data set {name!r} has no image with a label in its part train")
    roles, more = roles_of(list(used), name, given)
    for role in (role for role in ROLES if role in roles):
        part, labels = used[roles[role]]
        if isinstance(part.features[image], datasets.Image):  # the library's decoder has no limits on size or format
            part = part.cast_column(image, datasets.Image(decode=False))
        parts[role] = [
            Sample(_source(value, where := f"{name}, {roles[role]}, row {i}", image), where, labels[i])
            for i, value in enumerate(part[image])
            if labels[i] >= 0
        ]
    classes, lines = _renumbered(name, parts, getattr(first.features[label], "names", None))
    return assembled(name, parts, classes, image_size, [*more, *notes, *lines], preset)


def _splits(name: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """part → the library's data set."""
    import datasets

    repo = preset["repo"]
    folder = Path(repo)
    try:
        if not folder.is_dir():
            parts = datasets.load_dataset(repo, preset.get("config"))
        elif is_saved(folder):
            if preset.get("config"):
                raise DataError(
                    f"is {preset['config']!r}, but {folder} was saved without configurations",
                    option="data_config",
                    advice="Omit it",
                )
            parts = datasets.load_from_disk(repo)
        else:  # by the format's name: a folder's own script is never run
            files = _parts_of_files(folder, preset.get("config"), preset.get("split", {}))
            parts = datasets.load_dataset("parquet", data_files=files)
    except DataError:
        raise
    except Exception as error:  # the library passes on the errors of its many back ends
        lines = str(error).splitlines() or [type(error).__name__]
        of_configurations = "config" in lines[0].casefold()
        reason = " ".join(lines[: 2 if of_configurations else 1])
        if folder.is_dir() and _without_images(folder):
            raise DataError(f"the data set {name!r} is empty: its part train has no image") from error
        way = "read" if folder.is_dir() else "fetched"
        advice = "Choose one by {data_config}" if of_configurations else ""
        raise DataError(f"the data set {name!r} could not be {way}: {reason}", advice=advice) from error
    return dict(parts) if isinstance(parts, datasets.DatasetDict) else {"train": parts}


def _parts_of_files(folder: Path, config: str | None, given: Mapping[str, str]) -> dict[str, list[str]]:
    """part → parquet files, by the names that the hub gives: `data/train-00000-of-00001.parquet`, `train/0000.parquet`.

    Raises DataError for several configurations without a choice, and for files whose content Git LFS has not fetched.
    """
    configurations: dict[str, dict[str, list[str]]] = {}
    for path in parquet_files(folder):
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                raise DataError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in {folder}")
        way = path.relative_to(folder).parts[:-1]
        stem = re.sub(r"-\d+-of-\d+$" if path.stem in given.values() else r"(-\d+-of-\d+|[-_.]?\d+)$", "", path.stem)
        named = next((part for part in (*reversed(way), stem) if role_in(part, given) is not None), None)
        part = named if given and named else re.sub(r"\W", "_", named or stem) or "train"
        name = "/".join(part for part in way if role_in(part, given) is None and part != "data")
        configurations.setdefault(name, {}).setdefault(part, []).append(str(path))
    listed = some([name or "." for name in configurations], 5)
    if config is not None and config not in configurations:
        raise DataError(f"is {config!r}, but {folder} holds {listed}", option="data_config")
    if config is None and len(configurations) > 1:
        raise DataError(f"{folder} holds several configurations ({listed})", advice="Choose one by {data_config}")
    parts = configurations[config if config is not None else next(iter(configurations))]
    if len(parts) == 1 and not given and role_of(next(iter(parts))) is None:
        parts = {"train": next(iter(parts.values()))}
    return parts


def _renumbered(name: str, parts: dict[str, list[Sample]], names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The classes that have images, and notes on what was changed; the samples get labels without gaps."""
    present = sorted({sample.label for samples in parts.values() for sample in samples})
    if names is not None and present[-1] >= len(names):
        raise DataError(f"{name} has the label {present[-1]}, but only {len(names)} class names")
    classes = [str(label) if names is None else names[label] for label in present]
    if present == list(range(len(present if names is None else names))):
        return classes, []
    label_of = {label: i for i, label in enumerate(present)}
    for role, samples in parts.items():
        parts[role] = [Sample(sample.source, sample.name, label_of[sample.label]) for sample in samples]
    if names is None:
        listed = some(classes, 10)
        return classes, [f"{name}: the labels are not 0 to {len(classes) - 1}; they name the classes: {listed}"]
    unused = [names[label] for label in sorted({*range(len(names))} - {*present})]
    skipped = f"skipped {len(unused)} classes without an image ({some(unused)})"
    line = f"{name}: {skipped}; the other {len(classes)} are renumbered"
    return classes, [line]


def _without_images(folder: Path) -> bool:
    """Whether a saved data set, or its part train, lists no file of rows, which the library cannot read."""
    for state in (folder / "state.json", folder / "train" / "state.json"):
        try:
            return not read_json(state)["_data_files"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _source(value: Any, where: str, column: str) -> Source:
    """An image's file or its content. Raises DataError for anything else, such as a number or null."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return Path(value["path"])
    what = "no image" if value is None else f"{value!r:.40}"
    raise DataError(
        f"{where} has {what} in the column {column!r}, but must have an image",
        advice="Remove such rows, or set {image_column} to another column",
    )


def _label(value: Any, where: str, column: str) -> int:
    """A label as an integer. Raises DataError for anything else, such as a name or null."""
    if isinstance(value, int):
        return int(value)
    raise DataError(
        f"{where} has the label {value!r} in the column {column!r}, but labels must be integers",
        advice="Set {label_column} to another column, or make it a ClassLabel (datasets' class_encode_column)",
    )


def _column(name: str, what: str, wish: str | None, features: Any, kind: type) -> str:
    """The column of images or of labels: the requested one, else the only one of its type."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if wish is not None and wish not in features:
        raise DataError(f"the data set {name!r} has no column {wish!r}, only {', '.join(features)}")
    if wish is None and len(fitting) != 1:
        missing = "has no labels" if what == "label" and not fitting else f"has {len(fitting)} {what} columns"
        raise DataError(
            f"the data set {name!r} {missing}; its columns are {', '.join(features)}",
            advice=f"Set {{{what}_column}} to one of them",
        )
    return wish if wish is not None else fitting[0]
