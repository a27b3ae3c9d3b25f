"""A folder of images as a data set: which sub-folders are classes, and which are parts such as train and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun.classification.labeled import ImageData, Sample, assembled, by_number, role_in, role_of, roles_of
from salun.errors import DataError, some
from salun.images import counted, list_images, visible_folders

_DEEPEST = 4  # folders that may lie around the parts, as archives are unpacked
_OUTSIDE = "image outside the class folders"
_LINKED = "link to an image that is read already"


@dataclass(frozen=True)
class Layout:
    """parts: role → class → the folder of its images. notes: how the parts were found."""

    parts: dict[str, dict[str, Path]]
    notes: list[str]


def from_folder(folder: Path, image_size: int | None, preset: dict[str, Any]) -> ImageData:
    """Images in a sub-folder for each class; the classes are sorted, numbers as numbers.

    Folders named as splits (see `role_of`) hold the classes' folders or are in them. Images outside the classes'
    folders are skipped and counted, and links to images that a class has already. Raises DataError where there is no
    class folder, for a class without images, parts of different classes, an image that is in two classes by a link,
    folders with two possible readings, and what `assembled` raises.
    """
    layout = layout_of(folder, preset.get("split", {}))
    first = layout.parts["train"]
    if not first:
        raise DataError(f"{folder} has no labels: put the images of each class into a sub-folder named after it")
    classes = sorted(first, key=by_number)
    parts: dict[str, list[Sample]] = {}
    skipped = _outside(folder, [path for folders in layout.parts.values() for path in folders.values()])
    for role, folders in layout.parts.items():
        if set(folders) != set(classes):
            other = sorted({*classes} ^ {*folders})
            raise DataError(
                f"{folder}: the {role} part has other classes than the train part: {some(other)}",
                advice="Give both parts a folder for each class, and no other",
            )
        _check_classes(folder, folders)
        parts[role] = []
        for label, name in enumerate(classes):
            listing = list_images(folders[name])
            if not listing.files:
                held = "".join(f"; skipped: {line}" for line in counted(listing.skipped))
                raise DataError(
                    f"the class {name!r} is empty: {folders[name]} holds no image{held}",
                    advice="Add images to it, or remove the folder",
                )
            parts[role] += [Sample(path, str(path), label) for path in listing.files]
            for reason, names in listing.skipped.items():
                skipped.setdefault(reason, []).extend(f"{folders[name].relative_to(folder)}/{file}" for file in names)
    for role, more in _links_to_known_images(parts, classes).items():
        parts[role] = [sample for sample in parts[role] if sample.source not in more]
        skipped.setdefault(_LINKED, []).extend(str(path.relative_to(folder)) for path in sorted(more))
    name = folder.resolve().name
    notes = [*layout.notes, *(f"{name}: skipped {line}" for line in counted(skipped))]
    return assembled(name, parts, classes, image_size, notes, preset)


def _links_to_known_images(parts: dict[str, list[Sample]], classes: list[str]) -> dict[str, set[Path]]:
    """role → the files that lead to an image which that part has already.

    Raises DataError for an image that is in two classes, in one part or in two.
    """
    files = {s.source: (role, s.label) for role in parts for s in parts[role] if isinstance(s.source, Path)}
    real = {place: place.resolve() for place in {path.parent for path in files}}
    links = {path for path in files if path.is_symlink()}
    if not links and len({*real.values()}) == len(real):
        return {}
    known: dict[Path, tuple[Path, int, set[str]]] = {}
    again: dict[str, set[Path]] = {}
    for path, (role, label) in files.items():
        target = path.resolve() if path in links else real[path.parent] / path.name
        first, of_first, roles = known.setdefault(target, (path, label, set()))
        if label != of_first:
            raise DataError(
                f"{path} and {first} are one file, by a link, but in the classes {classes[label]!r} and "
                f"{classes[of_first]!r}",
                advice="Remove one of them",
            )
        if role in roles:
            again.setdefault(role, set()).add(path)
        roles.add(role)
    return again


def layout_of(folder: Path, given: Mapping[str, str]) -> Layout:
    """The parts and classes of a folder, which may be nested in further folders inside it. given: as of `role_in`."""
    root = folder
    for _ in range(_DEEPEST):
        layout = _parts_of_classes(root, given) or _classes_of_parts(root, given)
        if layout is not None:
            return layout
        names = visible_folders(root)
        if len(names) != 1:
            break
        root = root / names[0]
    if given:
        raise DataError(
            f"names {some([*given.values()])}, but {folder} has neither such parts with folders of classes, nor "
            "classes with such parts",
            option="split",
        )
    return Layout({"train": {name: folder / name for name in visible_folders(folder)}}, [])


def _parts_of_classes(root: Path, given: Mapping[str, str]) -> Layout | None:
    """Of `train/cats`, `train/dogs`, `val/cats` …; None for other folders. A class may be named train, too."""
    names = visible_folders(root)
    named = [name for name in names if role_in(name, given) is not None]
    splits = [name for name in named if _holds_classes(root / name)]
    if not splits:
        if named and (given or len(named) == len(names)):
            raise DataError(
                f"{root / named[0]} has no labels: put the images of each class into a sub-folder named after it"
            )
        return None
    others = [name for name in names if name not in splits]
    full = [name for name in others if list_images(root / name).files]
    if full and not given:
        raise DataError(
            f"{root} holds {some(splits)} with a folder for each class, as parts to train and test on, but also images "
            f"in {some(full)}: move these away, or, if all are classes, rename {splits[0]}"
        )
    roles, notes = roles_of(splits, root.name, given)
    notes += [
        f"{root.name}: the folder {name} {'has not been named' if name in full else 'holds no image'} and is not used"
        for name in others
    ]
    return Layout({role: _classes_in(root / name) for role, name in roles.items()}, notes)


def _classes_of_parts(root: Path, given: Mapping[str, str]) -> Layout | None:
    """Of `cats/train`, `cats/test`, `dogs/train` …; None for other folders, such as one around `train` and `test`."""
    inner = {name: visible_folders(root / name) for name in visible_folders(root)}
    if len(inner) < 2:
        return None
    if given:
        inner = {name: [part for part in parts if role_in(part, given)] for name, parts in inner.items()}
    split = [name for name in inner if inner[name] and all(role_in(part, given) for part in inner[name])]
    names: dict[str, str] = {}
    for part in sorted({part for name in split for part in inner[name]}):
        names.setdefault(part.casefold(), part)
    roles_here = {role_in(part, given) for part in names.values()}
    if "train" not in roles_here or (len(roles_here) < 2 and not given):
        return None
    undivided = [name for name in inner if name not in split and list_images(root / name).files]
    if undivided:
        raise DataError(
            f"{root}: the class {split[0]!r} has the parts {some(inner[split[0]])}, but {undivided[0]!r} has none: "
            "give every class the same parts"
        )
    roles, notes = roles_of(list(names.values()), root.name, given)
    parts: dict[str, dict[str, Path]] = {}
    for role, part in roles.items():
        parts[role] = {
            name: root / name / inside
            for name in split
            for inside in inner[name]
            if inside.casefold() == part.casefold()
        }
    return Layout(parts, notes)


def _holds_classes(part: Path) -> bool:
    """Whether a folder holds folders, and images in them unless it holds none itself."""
    names = visible_folders(part)
    return bool(names) and (
        any(list_images(part / name).files for name in names) or not list_images(part, deep=False).files
    )


def _classes_in(part: Path) -> dict[str, Path]:
    """class → folder, of a part's folder; archives may hold it twice (`seg_train/seg_train/…`)."""
    names = visible_folders(part)
    while len(names) == 1 and role_of(names[0]) == role_of(part.name) and visible_folders(part / names[0]):
        part = part / names[0]
        names = visible_folders(part)
    return {name: part / name for name in names}


def _check_classes(folder: Path, classes: dict[str, Path]) -> None:
    """Raises DataError if all classes with sub-folders have two in common: these may be parts of the data instead."""
    inner = {name: names for name, path in classes.items() if (names := visible_folders(path))}
    same = set.intersection(*map(set, inner.values())) if len(inner) > 1 else set()
    if len(same) > 1:
        raise DataError(
            f"{folder}: it is not clear whether {some(list(inner))} are classes, since each holds the folders "
            f"{some(sorted(same))}: name the parts of the data train, val and test, or put all images of a class into "
            "its folder itself"
        )


def _outside(folder: Path, classes: list[Path]) -> dict[str, list[str]]:
    """reason → the skipped files in the folders that contain the classes' folders, and in hidden folders there."""
    skipped: dict[str, list[str]] = {}
    around = {above for path in classes for above in path.parents if above == folder or folder in above.parents}
    for place in sorted(around):
        listing = list_images(place, deep=False)
        way = "" if place == folder else f"{place.relative_to(folder).as_posix()}/"
        for reason, names in {_OUTSIDE: [path.name for path in listing.files], **listing.skipped}.items():
            skipped.setdefault(reason, []).extend(way + name for name in names)
    return skipped
