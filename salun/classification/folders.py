"""A folder of images as a data set: which of its sub-folders are classes, and which are parts to train and test on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun.classification.labeled import ImageData, Sample, assembled, by_number, role_of, roles_of
from salun.errors import DataError, some
from salun.images import counted, is_hidden, list_images, suffixes, visible_folders

_DEEPEST = 4  # folders that may lie around the parts, as archives are unpacked


@dataclass(frozen=True)
class Layout:
    """parts: role → class → the folder of its images. notes: how the parts were found."""

    parts: dict[str, dict[str, Path]]
    notes: list[str]


def from_folder(folder: Path, image_size: int | None, preset: dict[str, Any]) -> ImageData:
    """Images in a sub-folder for each class; the classes are sorted, numbers as numbers.

    Folders named as splits (`train`, `val`, `test` and the like, in any case) hold the classes' folders or are in them.
    Raises DataError for images without a class, a class without images, parts of different classes, folders that can be
    read in two ways, and what `assembled` raises.
    """
    layout = layout_of(folder)
    first = layout.parts["train"]
    if not first:
        raise DataError(f"{folder} has no labels: put the images of each class into a sub-folder named after it")
    classes = sorted(first, key=by_number)
    parts: dict[str, list[Sample]] = {}
    skipped: dict[str, list[str]] = {}
    for role, folders in layout.parts.items():
        if set(folders) != set(classes):
            other = sorted({*classes} ^ {*folders})
            raise DataError(f"{folder}: the {role} part has other classes than the train part: {some(other)}")
        parts[role] = []
        for label, name in enumerate(classes):
            found = list_images(folders[name])
            if not found.files:
                held = "".join(f"; skipped: {line}" for line in counted(found.skipped))
                raise DataError(f"the class {name!r} is empty: {folders[name]} holds no image{held}")
            parts[role] += [Sample(path, str(path), label) for path in found.files]
            for reason, names in found.skipped.items():
                skipped.setdefault(reason, []).extend(f"{folders[name].relative_to(folder)}/{file}" for file in names)
    name = folder.resolve().name
    notes = [*layout.notes, *(f"{name}: skipped {line}" for line in counted(skipped))]
    return assembled(name, parts, classes, image_size, notes, preset)


def layout_of(folder: Path) -> Layout:
    """The parts and classes of a folder, which may lie in folders of their own inside it."""
    root = folder
    for _ in range(_DEEPEST):
        found = _parts_of_classes(root) or _classes_of_parts(root)
        if found is not None:
            return found
        names = visible_folders(root)
        if len(names) != 1 or _has_images(root):
            break
        root = root / names[0]
    return Layout({"train": {name: folder / name for name in visible_folders(folder)}}, [])


def _parts_of_classes(root: Path) -> Layout | None:
    """Of `train/cats`, `train/dogs`, `val/cats` …; None for other folders. A class may be named train, too."""
    names = visible_folders(root)
    named = [name for name in names if role_of(name) is not None]
    splits = [name for name in named if visible_folders(root / name) and not _has_images(root / name)]
    if not splits:
        if named and len(named) == len(names):
            raise DataError(
                f"{root / named[0]} has no labels: put the images of each class into a sub-folder named after it"
            )
        return None
    others = [name for name in names if name not in splits]
    full = [name for name in others if list_images(root / name).files]
    if full:
        raise DataError(
            f"{root} holds {some(splits)} with a folder for each class, as parts to train and test on, but also images "
            f"in {some(full)}: move these away, or, if all are classes, rename {splits[0]}"
        )
    roles, notes = roles_of(splits, root.name)
    notes += [f"{root.name}: the folder {name} holds no image and is not used" for name in others]
    return Layout({role: _folders(root / name) for role, name in roles.items()}, notes)


def _classes_of_parts(root: Path) -> Layout | None:
    """Of `cats/train`, `cats/test`, `dogs/train` …; None for other folders, such as one around `train` and `test`."""
    inner = {name: visible_folders(root / name) for name in visible_folders(root)}
    if len(inner) < 2:
        return None
    split = [name for name in inner if inner[name] and all(map(role_of, inner[name])) and not _has_images(root / name)]
    names: dict[str, str] = {}
    for part in sorted({part for name in split for part in inner[name]}):
        names.setdefault(part.casefold(), part)
    if len({role_of(part) for part in names}) < 2 or not any(role_of(part) == "train" for part in names):
        return None
    whole = [name for name in inner if name not in split and list_images(root / name).files]
    if whole:
        raise DataError(
            f"{root}: the class {split[0]!r} has the parts {some(inner[split[0]])}, but {whole[0]!r} has none: give "
            "every class the same"
        )
    roles, notes = roles_of(list(names.values()), root.name)
    parts: dict[str, dict[str, Path]] = {}
    for role, part in roles.items():
        parts[role] = {
            name: root / name / own for name in split for own in inner[name] if own.casefold() == part.casefold()
        }
    return Layout(parts, notes)


def _folders(root: Path) -> dict[str, Path]:
    return {name: root / name for name in visible_folders(root)}


def _has_images(folder: Path) -> bool:
    """Whether image files lie in the folder itself."""
    return any(path.suffix.lower() in suffixes() and not is_hidden(path.name) for path in folder.iterdir())
