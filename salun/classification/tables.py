"""A folder whose images are labeled by a table: `metadata.csv` or `metadata.jsonl`, as Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from salun.classification.labeled import ImageData, Sample, assembled, by_number, role_in, roles_of
from salun.errors import DataError, some
from salun.images import counted, is_hidden, list_images, shown
from salun.untrusted import parse_json

NAMES = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "image_file_name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
UNLABELED = ("", "-1", "-1.0", "none", "null", "nan", "n/a")  # in any case
NO_SPLIT = "(no split)"  # of rows whose column `split` is empty, where others' is not
MOST_BYTES = 2**28  # of a table
_DEEPEST = 3  # folders below the data set's, as in data/train/metadata.csv

SEPARATORS = {";": "semicolons", "\t": "tabs"}  # of files that other programs call CSV

Row = dict[str, Any]
Labeled = tuple[str, Path, str]  # part, image file, label


@dataclass(frozen=True)
class UnusedTable:
    """Why a table is not used, and the option that names the column which it seems to lack."""

    note: str
    option: str


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder of images, sorted."""
    patterns = ["/".join(["*"] * depth + [name]) for depth in range(_DEEPEST) for name in NAMES]
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts)))


def from_tables(
    folder: Path,
    tables: Sequence[Path],
    image_size: int | None,
    preset: dict[str, Any],
) -> ImageData | UnusedTable:
    """A data set from its tables; `UnusedTable` for one without a column of files or labels, if none is requested.
    A row's part is its column `split`, or a folder in its file's path with a part's name. Raises DataError for a table
    that cannot be read, a row with a missing file, one outside the folder or more than one label, an image with two
    labels, and what `assembled` raises.
    """
    name, rows, given = folder.resolve().name, list[tuple[str, Path, Any]](), preset.get("split", {})
    for table in tables:
        read = _read(table, folder, preset)
        if isinstance(read, UnusedTable):
            return read
        rows += read
    labeled = [(part, path, text) for part, path, label in rows if (text := _filled(label))]
    if not labeled:
        raise DataError(f"{folder}: no row of {tables[0].name} has a label")
    known = _once(_whole_numbers(labeled), folder)
    roles, notes = roles_of(list(dict.fromkeys(part for part, _, _ in known)), name, given)
    if len(labeled) < len(rows):
        notes.append(f"{name}: skipped {len(rows) - len(labeled)} images without a label")
    if len(known) < len(labeled):
        notes.append(f"{name}: skipped {len(labeled) - len(known)} rows of images that a row before them names")
    classes = sorted({label for part, _, label in known if part in roles.values()}, key=by_number)
    if all(label.isdigit() for label in classes) and classes != [str(i) for i in range(len(classes))]:
        notes.append(f"{name}: the labels are not 0 to {len(classes) - 1}; they name the classes: {some(classes, 10)}")
    listed = {path.resolve() for _, path, _ in rows}
    listing = list_images(folder)
    others = [path for path in listing.files if path.resolve() not in listed]
    if others:
        notes.append(f"{name}: skipped {len(others)} images that no table names")
    read_here = {shown(path, folder) for path in (*tables, *(path for _, path, _ in rows))}
    skipped = {why: [file for file in files if file not in read_here] for why, files in listing.skipped.items()}
    notes += [f"{name}: skipped {line}" for line in counted(skipped)]
    parts = {
        role: [Sample(path, str(path), classes.index(label)) for of_part, path, label in known if of_part == part]
        for role, part in roles.items()
    }
    return assembled(name, parts, classes, image_size, notes, preset)


def _read(table: Path, folder: Path, preset: dict[str, Any]) -> list[tuple[str, Path, Any]] | UnusedTable:
    """The part, file and label of each row of a table."""
    read, image, label = _rows(table), preset.get("image"), preset.get("label")
    columns = list(dict.fromkeys(column for row in read for column in row))
    of_files = _column(table, columns, image, FILE_COLUMNS, "image_column")
    of_labels = _column(table, columns, label, LABEL_COLUMNS, "label_column")
    if of_files is None or of_labels is None:
        what, option = ("files", "image_column") if of_files is None else ("labels", "label_column")
        what = f"has no column of {what}, only {some(columns, 10)}"
        if image is None and label is None:
            note = f"{folder.resolve().name}: the table {shown(table, folder)} {what}, and is not used"
            return UnusedTable(note, option)
        raise DataError(f"{table} {what}", advice=f"Name it by {{{option}}}")
    default = NO_SPLIT if any(_filled(row.get("split")) for row in read) else "train"
    rows = []
    for number, row in enumerate(read, 1):
        value, path = row.get(of_labels), _path(table, row, of_files)
        if isinstance(value, (list, dict)):
            raise DataError(
                f"{table}: the label of image {number} is {value!r:.40}, but must be a name or a number",
                advice="A classifier has one label per image",
            )
        if _filled(value) and not path.is_file():
            raise DataError(
                f"{table}, row {number}, names {shown(path, table.parent)}, which does not exist",
                advice="Correct or remove the row",
            )
        way = path.relative_to(folder).parts[:-1]
        of_folder = next((part for part in way if role_in(part, preset.get("split", {})) is not None), default)
        rows.append((_filled(row.get("split")) or of_folder, path, value))
    return rows


def _rows(table: Path) -> list[Row]:
    try:
        if table.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True) if table.suffix == ".csv" else _json_lines(file)
            rows = [{column.strip(): value for column, value in row.items() if column is not None} for row in reader]
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8", advice="Save it as UTF-8") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    for separator, plural in SEPARATORS.items() if table.suffix == ".csv" else ():
        if rows and len(rows[0]) == 1 and separator in next(iter(rows[0])):
            raise DataError(f"{table} is separated by {plural}", advice="Save it with commas")
    return rows


def _json_lines(lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield row


def _column(table: Path, columns: list[str], wish: str | None, usual: tuple[str, ...], option: str) -> str | None:
    if wish is not None and wish not in columns:
        raise DataError(f"is {wish!r}, but {table} has no such column, only {some(columns, 10)}", option=option)
    return wish or next((column for column in usual if column in columns), None)


def _path(table: Path, row: Row, column: str) -> Path:
    """The image file of a row. Raises DataError for one outside the table's folder."""
    named = PurePosixPath(str(row.get(column)).replace("\\", "/"))
    if named.is_absolute() or ".." in named.parts or not row.get(column):
        raise DataError(f"{table} names the file {str(named)!r}, which is not inside its folder")
    return table.parent.joinpath(*named.parts)


def _whole_numbers(rows: list[Labeled]) -> list[Labeled]:
    """The rows with the labels 1.0 and 1 as one, "1", if all labels are whole numbers: floats stand for integers in a
    table that had gaps.
    """
    integers = {label: re.fullmatch(r"(-?\d+)(\.0*)?", label) for _, _, label in rows}
    if not all(integers.values()):
        return rows
    return [(part, path, match[1]) for part, path, label in rows if (match := integers[label])]


def _once(rows: list[Labeled], folder: Path) -> list[Labeled]:
    """The rows whose image is not named by a row before them, of the same part. Raises DataError for an image with two
    labels.
    """
    known: dict[Path, tuple[str, set[str]]] = {}
    unique = []
    for part, path, label in rows:
        first, parts = known.setdefault(path.resolve(), (label, set()))
        if label != first:
            raise DataError(
                f"{folder}: {shown(path, folder)} has two labels, {first!r} and {label!r}",
                advice="A classifier has one label per image: remove or correct a row",
            )
        if part not in parts:
            unique.append((part, path, label))
        parts.add(part)
    return unique


def _filled(value: Any) -> str:
    """A cell as text; empty for the spellings of a missing value."""
    text = str(value).strip()
    return "" if text.casefold() in UNLABELED else text
