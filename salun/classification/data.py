"""Image data as tensors in memory: digits, clutter, a folder of pictures, any Hugging Face image data set."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salun.classification import clutter
from salun.errors import ConfigError, DataError
from salun.untrusted import read_yaml

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled pictures; a picture's row is its number everywhere.

    images: uint8 (n, c, h, w). labels: int64 (n,). classes: names by label. own_test: rows of the data set's own test
    part, None where it has none. preset: mean, std, augment, model and train, from `datasets.yaml`.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    own_test: Tensor | None = None
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for colour."""
        return int(self.images.shape[1])

    @property
    def size(self) -> int:
        """Pixels of the longer side."""
        return int(max(self.images.shape[2:]))

    @cached_property
    def digest(self) -> str:
        """A hash of pixels, labels and class names: two data sets with the same one are the same."""
        found = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def to(self, device: torch.device) -> ImageData:
        """The same on a device; rows are given on any."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pictures(self, rows: Tensor) -> Tensor:
        """The pictures of these rows, normalised: float32 (b, c, h, w)."""
        return self.normalised(self.images[rows.to(self.images.device)])

    def normalised(self, images: Tensor) -> Tensor:
        """(pixels/255 − mean) / std of uint8 pictures."""
        mean, std = (torch.tensor(self.preset[key], device=images.device).view(-1, 1, 1) for key in ("mean", "std"))
        return (images.float() / 255 - mean) / std

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """As `pictures`, each shifted by up to an eighth of its size over black and, for crop-flip, half mirrored."""
        kind = self.preset["augment"]
        if kind == "none":
            return self.pictures(rows)
        images = self.images[rows.to(self.images.device)]
        (b, _, h, w), pad = images.shape, self.size // 8
        shift = torch.randint(0, 2 * pad + 1, (b, 2), generator=generator).to(images.device)
        flip = (torch.rand(b, generator=generator) < (0.5 if kind == "crop-flip" else 0.0)).to(images.device)
        down = torch.arange(h, device=images.device) + shift[:, :1]
        across = torch.arange(w, device=images.device) + shift[:, 1:]
        across = torch.where(flip[:, None], across.flip(1), across)
        padded = F.pad(images, (pad, pad, pad, pad))
        each = torch.arange(b, device=images.device)[:, None, None]
        return self.normalised(padded[each, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2))


@cache
def presets() -> dict[str, Any]:
    """The data sets known by name, and under "others" what serves all else."""
    path = Path(__file__).resolve().parents[1] / "assets" / "datasets.yaml"
    found: dict[str, Any] = read_yaml(path)
    return found


def load_data(
    name: str, image_size: int | None = None, image_column: str | None = None, label_column: str | None = None
) -> ImageData:
    """The data set of a name: `digits`, `clutter`, a preset, a folder of pictures or of a saved data set, or a hub id.

    image_size: pixels a side, to which pictures of different sizes are brought. image_column, label_column: of a
    Hugging Face data set that is no preset. Raises DataError if it is not there, or cannot serve (see `from_folder`),
    ConfigError for a size of `digits` or `clutter`.
    """
    known, others = presets()["datasets"], presets()["others"]
    if name in EMBEDDED:
        if image_size is not None:
            raise ConfigError(f"--image-size {image_size}: {name} has pictures of one size, as they are; leave it out")
        return replace(EMBEDDED[name](), preset=known[name])
    if name in known:
        columns = {"image": image_column, "label": label_column}
        return from_hub(name, known[name] | {key: value for key, value in columns.items() if value}, image_size)
    path = Path(name).expanduser()
    saved = any((path / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        return replace(from_folder(path, image_size), preset=others)
    if saved or name.count("/") == 1:
        columns = {"repo": str(path) if saved else name, "image": image_column, "label": label_column}
        return from_hub(name, others | {key: value for key, value in columns.items() if value}, image_size)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"give a folder, a hub id, or one of {', '.join(known)}"
    raise DataError(f"there is no data set {name!r}: {hint}")


def _digits() -> ImageData:
    """1,797 pictures (1, 8, 8): pixels of 0 to 16, times 15."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn: pip install salun[classification]") from error
    found = load_digits()
    images = torch.from_numpy((found.images * 15).astype(np.uint8)).unsqueeze(1)
    return ImageData("digits", images, torch.from_numpy(found.target).long(), tuple("0123456789"))


def _clutter() -> ImageData:
    """2,000 pictures (1, 12, 12), see `clutter.py`."""
    images, labels = clutter.draw()
    return ImageData("clutter", torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels), clutter.CLASSES)


EMBEDDED = {"digits": _digits, "clutter": _clutter}  # those that need no download


def from_folder(path: Path, image_size: int | None = None) -> ImageData:
    """Pictures with a sub-folder for each class; with `train` and `test` sub-folders, those hold the classes'.

    Grey pictures stay grey if all are; transparency is shown on white; 16 bits become 8. Raises DataError for pictures
    without a class, a class without pictures, one class only, a file that is no picture, and different sizes.
    """
    parts = [path]
    if (path / "train").is_dir() and (path / "test").is_dir():
        parts = [path / "train", path / "test"]
    classes = _folders(parts[0])
    if not classes:
        raise DataError(f"{path} has no labels: put the pictures of each class into a sub-folder named after it")
    for other in parts[1:]:
        if _folders(other) != classes:
            unlike = sorted({*classes} ^ {*_folders(other)})
            raise DataError(f"{other} has other classes than {parts[0]}: {', '.join(unlike[:3])}")
    pictures, labels, counts = [], [], []
    for part in parts:
        for label, name in enumerate(classes):
            files = sorted(f for f in (part / name).rglob("*") if f.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"the class {name!r} is empty: {part / name} holds no picture")
            pictures += [read_picture(f) for f in files]
            labels += [label] * len(files)
        counts.append(len(labels))
    test = torch.arange(counts[0], counts[1]) if len(counts) == 2 else None
    return ImageData(path.name, _stack(pictures, image_size, str(path)), torch.tensor(labels), tuple(classes), test)


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def from_hub(name: str, preset: dict[str, Any], image_size: int | None = None) -> ImageData:
    """A Hugging Face image data set, from the hub or from a folder that `save_to_disk` wrote.

    preset: repo, config, image, label and test (column and split names; found by their types where not given), and how
    to train. Raises DataError if `datasets` is not installed, the data cannot be had, or has no pictures or no labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"the data set {name!r} needs the package datasets: pip install salun[datasets]") from error
    repo = preset["repo"]
    try:
        found = (
            datasets.load_from_disk(repo) if Path(repo).is_dir() else datasets.load_dataset(repo, preset.get("config"))
        )
    except Exception as error:  # the library raises what its many back ends raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(repo).is_dir() and _without_pictures(Path(repo)):
            raise DataError(f"the data set {name!r} is empty: its part train has no picture") from error
        way = "read" if Path(repo).is_dir() else "fetched"
        raise DataError(f"the data set {name!r} could not be {way}: {reason}") from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    if "train" not in splits:
        raise DataError(f"the data set {name!r} has no part named train, only {', '.join(map(str, splits))}")
    features = splits["train"].features
    image = _column(name, "image", preset.get("image"), features, datasets.Image)
    label = _column(name, "label", preset.get("label"), features, datasets.ClassLabel)
    names = getattr(features[label], "names", None)
    parts = [splits["train"], *(splits[s] for s in [preset.get("test", "test")] if s in splits)]
    if not len(parts[0]):
        raise DataError(f"the data set {name!r} is empty: its part train has no picture")
    pictures = [_picture(row, f"{name}, row {i}", image) for part in parts for i, row in enumerate(part[image])]
    labels = torch.tensor([_label(v, f"{name}, row {i}", label) for part in parts for i, v in enumerate(part[label])])
    if names is None:
        names = [str(v) for v in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0:
        raise DataError(f"the data set {name!r} has pictures without a label (−1): choose a part that has them")
    test = torch.arange(len(parts[0]), len(labels)) if len(parts) == 2 else None
    return ImageData(name, _stack(pictures, image_size, name), labels, tuple(names), test, preset)


def _without_pictures(folder: Path) -> bool:
    """Whether a saved data set, or its part train, lists no file of rows: the library does not read such a one."""
    for state in (folder / "state.json", folder / "train" / "state.json"):
        try:
            return not json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _picture(value: Any, where: str, column: str) -> np.ndarray:
    """A picture's pixels (see `pixels`). Raises DataError for what is none, such as a number or nothing."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return pixels(value, where)
    what = "no picture" if value is None else f"{value!r:.40}"
    raise DataError(
        f"{where} has {what} in the column {column!r}, where a picture must be: leave such rows out, or name another "
        "by --image-column"
    )


def _label(value: Any, where: str, column: str) -> int:
    """A label as a number. Raises DataError for what is none, such as a name or nothing."""
    if isinstance(value, int):
        return int(value)
    raise DataError(
        f"{where} has the label {value!r} in the column {column!r}, where a whole number must be: name another by "
        "--label-column, or make it a ClassLabel (datasets' class_encode_column)"
    )


def _column(name: str, what: str, wish: str | None, features: Any, kind: type) -> str:
    """The column of pictures or of labels: the one asked for, else the only one of its type."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if wish is not None and wish not in features:
        raise DataError(f"the data set {name!r} has no column {wish!r}, only {', '.join(features)}")
    if wish is None and len(fitting) != 1:
        missing = "has no labels" if what == "label" and not fitting else f"has {len(fitting)} {what} columns"
        raise DataError(f"the data set {name!r} {missing}: name one by --{what}-column ({', '.join(features)})")
    return wish if wish is not None else fitting[0]


def read_picture(path: Path) -> np.ndarray:
    """A file's pixels, uint8 (h, w) or (h, w, 3). Raises DataError if it is no picture (see `pixels`)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return pixels(image, str(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


def pixels(image: Picture, where: str) -> np.ndarray:
    """uint8 (h, w) for grey, (h, w, 3) for colour. Transparency is shown on white, 16 bits are scaled to 8.

    Raises DataError for pixels of 32 bits or of floats, whose range nobody knows.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65_535:
            raise DataError(f"{where} has pixels of 32 bits: save it with 8 or 16")
        return (deep // 257).astype(np.uint8)
    if image.mode == "F":
        raise DataError(f"{where} has floats for pixels: save it with 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        grey = image.mode in ("LA", "L", "1")
        shown = image.convert("RGBA")
        white = Image.new("RGBA", shown.size, "white")
        return np.array(Image.alpha_composite(white, shown).convert("L" if grey else "RGB"))
    return np.array(image.convert("L" if image.mode in ("L", "1") else "RGB"))


def _stack(pictures: Sequence[np.ndarray], image_size: int | None, where: str) -> Tensor:
    """uint8 (n, c, h, w); colour if one picture has any. Raises DataError for sizes that differ and no size to take."""
    from PIL import Image

    sizes = {p.shape[:2] for p in pictures}
    if len(sizes) > 1 and image_size is None:
        least, largest = min(sizes), max(sizes)
        raise DataError(
            f"{where} has pictures of different sizes (from {least[1]}×{least[0]} to {largest[1]}×{largest[0]}): "
            "name one by --image-size"
        )
    colour = any(p.ndim == 3 for p in pictures)
    if image_size is not None and sizes != {(image_size, image_size)}:
        pictures = [
            np.array(Image.fromarray(p).resize((image_size, image_size), Image.Resampling.BICUBIC)) for p in pictures
        ]
    rows: Iterable[np.ndarray] = (
        np.repeat(p[None], 3, 0) if colour and p.ndim == 2 else p[None] if p.ndim == 2 else p.transpose(2, 0, 1)
        for p in pictures
    )
    return torch.from_numpy(np.stack(list(rows)))
