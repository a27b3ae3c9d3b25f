"""Which rows train, validate and test, and which of the training rows are to be forgotten. Stored in `split.json`."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.classification.data import ImageData
from salun.errors import ConfigError, DataError, literal, some
from salun.files import write_bytes
from salun.randomness import generator_of
from salun.untrusted import read_json
from salun.user_text import as_spelled, composed

FORMAT = "salun-split-1"
PARTS = ("train", "validation", "test", "forget", "retain")


@dataclass(frozen=True, eq=False)
class Split:
    """Rows, int64 and ascending. train, validation and test are disjoint; train = forget ∪ retain.

    data: the digest of the data set whose rows these are. forgetting: the option `forget`, "" before it applies.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    forget: Tensor
    retain: Tensor
    data: str
    forgetting: str = ""

    @property
    def base(self) -> str:
        """A hash of the data, train, validation and test: an original and its unlearned models have the same."""
        return self._hash(PARTS[:3])

    @property
    def digest(self) -> str:
        """A hash of the data and of all parts: the same for an unlearned model and its Retrain."""
        return self._hash(PARTS)

    def _hash(self, parts: tuple[str, ...]) -> str:
        text = json.dumps([self.data, *(getattr(self, part).tolist() for part in parts)])
        return hashlib.sha256(text.encode()).hexdigest()

    def without_forget_set(self) -> Split:
        """The same with nothing to forget: all of train is retained."""
        return replace(self, forget=self.train[:0], retain=self.train, forgetting="")

    def retained_test_rows(self, labels: Tensor) -> Tensor:
        """The test rows of retained classes; completely forgotten classes do not count in the test accuracy."""
        return self.test[torch.isin(labels.cpu()[self.test], labels.cpu()[self.retain])]

    def check_rows(self, n: int, where: Path) -> None:
        """Raises DataError if a row is not one of the data's n rows."""
        rows = torch.cat([getattr(self, part) for part in PARTS])
        outside = rows[(rows < 0) | (rows >= n)]
        if len(outside):
            raise DataError(f"{where}: row {int(outside[0])} is out of range, the data has rows 0 to {n - 1}")

    def save(self, path: Path) -> None:
        """Write `split.json` atomically."""
        record: dict[str, Any] = {"format": FORMAT, "data": self.data, "forgetting": self.forgetting}
        record.update({part: getattr(self, part).tolist() for part in PARTS})
        write_bytes(path, (json.dumps(record) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a `split.json`. Raises DataError if it is invalid."""
        try:
            record = read_json(path)
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']!r}")
            rows = {part: torch.tensor(record[part], dtype=torch.int64) for part in PARTS}
            if any(values.dim() != 1 for values in rows.values()):
                raise ValueError("a part is not a list of rows")
            return cls(**rows, data=str(record["data"]), forgetting=str(record["forgetting"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read as a split: {error}") from error


def make_split(data: ImageData, test_share: float, validation_share: float, seed: int) -> Split:
    """Train, validation and test by a seeded permutation; nothing is forgotten yet.

    The data set's own test and validation parts are used if it has them. Otherwise test_share is a fraction of all rows
    and validation_share one of the rows that are not test rows. Raises DataError if the test part or a class of the
    training part is empty, or there is only one class.
    """
    if len(data.classes) < 2:
        raise DataError(
            f"{data.name} has only one class ({''.join(data.classes)}), but a classifier needs two or more",
            advice="Add images of another class",
        )
    n, generator = len(data.labels), generator_of(seed, "split")
    given_parts = [rows for rows in (data.own_test, data.own_validation) if rows is not None]
    others = torch.ones(n, dtype=torch.bool)
    others[torch.cat([torch.empty(0, dtype=torch.int64), *given_parts])] = False
    rows = others.nonzero().view(-1)
    rest = rows[torch.randperm(len(rows), generator=generator)]
    test, validation = data.own_test, data.own_validation
    if test is None:
        count = int(Decimal(str(test_share)) * len(rows))
        test, rest = rest[:count], rest[count:]
    if validation is None:
        count = int(Decimal(str(validation_share)) * len(rest))
        validation, rest = rest[:count], rest[count:]
    train = rest
    counts = torch.bincount(data.labels.cpu()[train], minlength=len(data.classes))
    if not len(test):
        raise DataError(f"{data.name} has no test images", advice="Raise {test_share}")
    if not counts.all():
        empty = (counts == 0).nonzero().view(-1).tolist()
        of_all = torch.bincount(data.labels.cpu(), minlength=len(data.classes))[empty[0]]
        more = f", and {len(empty) - 1} other classes have none either" if len(empty) > 1 else ""
        raise DataError(
            f"{data.name}: the class {data.classes[empty[0]]!r} has no training images (of {int(of_all)} in all){more}",
            advice="Add images, remove the class, or draw another split by {split_seed}",
        )
    train = train.sort().values
    return Split(train, validation.sort().values, test.sort().values, train[:0], train, data.digest)


def with_forget(split: Split, data: ImageData, wish: str, seed: int) -> Split:
    """The split with the rows to forget: random:0.1, class:NAME, or a JSON list of rows.

    A class may be given by its index if no class has a number as its name; `forgetting` has its name.

    Raises ConfigError for a fraction outside (0, 1) or of no image, an unknown class, or any other text;
    DataError for rows out of range, repeated, or not trained on.
    """
    kind, _, value = wish.partition(":")
    if kind == "random" and value:
        forget = _random(split.train, value, seed)
    elif kind == "class" and value:
        label = _class(data, value)
        forget, wish = split.train[data.labels.cpu()[split.train] == label], f"class:{data.classes[label]}"
    elif wish.endswith(".json"):
        forget = _listed(as_spelled(Path(wish).expanduser()), split, len(data.labels))
    else:
        raise ConfigError(
            f"is {wish!r}, but must be random:FRACTION, class:NAME, or a .json list of rows", option="forget"
        )
    retain = split.train[~torch.isin(split.train, forget)]
    if not len(retain):
        raise ConfigError(f"is {wish}, which is every training image, but some must be retained", option="forget")
    return replace(split, forget=forget, retain=retain, forgetting=wish)


def check_retained_test_rows(split: Split, data: ImageData) -> None:
    """Raises DataError if no test image is of a retained class: TA and MIA would have nothing to be measured on."""
    if len(split.retained_test_rows(data.labels)):
        return
    retained = [data.classes[label] for label in data.labels.cpu()[split.retain].unique().tolist()]
    raise DataError(
        f"{data.name}: no test image is of a retained class ({some(retained)})",
        advice="Raise {test_share} or draw another split by {split_seed}",
    )


def _random(train: Tensor, value: str, seed: int) -> Tensor:
    try:
        fraction = Decimal(value)
    except InvalidOperation as error:
        raise ConfigError(
            f"is random:{value}, which is not a number", option="forget", advice="Use random:0.1 for a tenth"
        ) from error
    if not fraction.is_finite() or not 0 < fraction < 1:
        raise ConfigError(
            f"is random:{value}, but the fraction of the training images must be above 0 and below 1", option="forget"
        )
    count = int(fraction * len(train))
    if not count:
        raise ConfigError(
            f"is random:{value}, which selects none of the {len(train)} training images",
            option="forget",
            advice="Use a larger fraction",
        )
    drawn = torch.randperm(len(train), generator=generator_of(seed, "forget"))
    return train[drawn[:count]].sort().values


def _class(data: ImageData, value: str) -> int:
    """The label of a class given by its name, or by its index if no class has a number as its name."""
    if value in data.classes:
        return data.classes.index(value)
    names = [composed(name) for name in data.classes]
    if composed(value) in names:
        return names.index(composed(value))
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None
    if number is not None:
        counted = {number: f"is class number {number}, counted from 0"} if number < len(data.classes) else {}
        equal = {i: f"equals {value}" for i, name in enumerate(data.classes) if _equals(name, number)}
        if counted and not any(name.isascii() and name.isdigit() for name in data.classes):
            return number
        if counted or equal:
            readings = " or ".join(f"class:{data.classes[i]} ({why})" for i, why in (equal | counted).items())
            raise ConfigError(
                f"is class:{value}, but {data.name} has no class named {value!r}",
                option="forget",
                advice=literal(f"Use {readings}"),
            )
    shown = ", ".join(data.classes[:10]) + (", …" if len(data.classes) > 10 else "")
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(composed(value).casefold(), folded, 1)
    raise ConfigError(
        f"is class:{value}, which does not exist: {data.name} has {len(data.classes)} classes ({shown})",
        option="forget",
        advice=literal(f"Did you mean class:{folded[near[0]]}?") if near else "",
    )


def _equals(name: str, number: int) -> bool:
    return name.isascii() and name.isdigit() and name.lstrip("0") == str(number).lstrip("0")


def remarks(data: ImageData, split: Split) -> list[str]:
    """What a user should know of a split: images in two of its parts, images in two classes, and classes that TA does
    not show, as the test set has none of their images.
    """
    counts = torch.bincount(data.labels.cpu()[split.test], minlength=len(data.classes))
    names = [data.classes[i] for i in (counts == 0).nonzero().view(-1).tolist()]
    number = "1 class" if len(names) == 1 else f"{len(names)} classes"
    absent = [f"{data.name}: the test set has no image of {number}: {some(names)}"] if names else []
    images = data.images.cpu().contiguous().numpy()
    rows = torch.cat([split.train, split.validation, split.test]).tolist()
    digests = {row: hashlib.sha256(images[row]).digest() for row in rows}
    return [*_in_two_parts(data, split, digests), *_in_two_classes(data, digests), *absent]


def _in_two_parts(data: ImageData, split: Split, digests: Mapping[int, bytes]) -> list[str]:
    """A note for each pair of parts with common images: how many images of one have the pixels of one of the other."""
    held = {
        part: [digests[row] for row in getattr(split, part).tolist()]
        for part in ("forget", "retain", "validation", "test")
    }
    lines = []
    for first, second in combinations(held, 2):
        both = {*held[first]} & {*held[second]}
        count = sum(digest in both for digest in held[first])
        if count:
            lines.append(f"{data.name}: {count:,} images of the {first} set are also in the {second} set (same pixels)")
    return lines


def _in_two_classes(data: ImageData, digests: Mapping[int, bytes]) -> list[str]:
    """A note on images of equal pixels and different labels, with the first two, as most likely a label is wrong."""
    labels = data.labels.tolist()
    rows_of: dict[bytes, list[int]] = {}
    for row in sorted(digests):
        rows_of.setdefault(digests[row], []).append(row)
    groups = [rows for rows in rows_of.values() if len({labels[row] for row in rows}) > 1]
    if not groups:
        return []
    first = groups[0][0]
    second = next(row for row in groups[0] if labels[row] != labels[first])
    shown = ", ".join(f"{data.image_name(row)} ({data.classes[labels[row]]})" for row in (first, second))
    return [f"{data.name}: {sum(map(len, groups)):,} images have the pixels of an image of another class: {shown}"]


def _listed(path: Path, split: Split, n: int) -> Tensor:
    try:
        rows_listed = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"is {path}, which cannot be read as JSON: {error}", option="forget") from error
    if not isinstance(rows_listed, list) or not rows_listed or not all(type(v) is int for v in rows_listed):
        raise DataError(f"is {path}, which must hold a list of row numbers, such as [3, 14, 15]", option="forget")
    outside = next((v for v in rows_listed if not 0 <= v < n), None)
    if outside is not None:
        raise DataError(
            f"is {path}, but its row {outside} is out of range: the data has rows 0 to {n - 1}", option="forget"
        )
    rows = torch.tensor(rows_listed).sort().values
    twice = rows[1:][rows[1:] == rows[:-1]]
    if len(twice):
        raise DataError(f"is {path}, but its row {int(twice[0])} is repeated", option="forget")
    unseen = rows[~torch.isin(rows, split.train)]
    if len(unseen):
        raise DataError(
            f"is {path}, but its row {int(unseen[0])} is not in the training part (the model never saw it)",
            option="forget",
            advice="See split.json of a run for the rows that are",
        )
    return rows
