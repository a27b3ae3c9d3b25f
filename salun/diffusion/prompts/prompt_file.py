"""Prompts of a file or a data set, each with the seed, guidance and size that it is to be sampled with.

Public benchmarks of erasure have the same few columns under several names: I2P `sd_seed` and `sd_guidance_scale`,
UnlearnDiffAtk and ESD `evaluation_seed` and `evaluation_guidance`, and so on. All of them are read here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from salun.checkpoints.hub import cache_without_network
from salun.errors import DataError, literal, some
from salun.extras import install_command
from salun.untrusted import read_text

COLUMNS = {  # field of `PromptRow` → names of its column, in the order of preference
    "text": ("prompt", "adv_prompt", "text", "caption", "captions", "sanitized_adv_prompt", "target_prompt"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance", "cfg_scale"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "id": ("case_number", "case_num", "image_id", "coco_id", "id", "idx"),
}
LABELS = (
    "categories", "category", "class", "artist", "type", "concept", "label", "label_str", "object", "style",
    "profession",
)  # fmt: skip
KNOWN = {*LABELS, *(name for names in COLUMNS.values() for name in names)}
DELIMITERS = (",", ";", "\t")
TABLES, LINES = (".csv", ".tsv"), ".txt"

FILE_BYTES = 20_000_000  # COCO's 30,000 captions take 2.5 million
ROWS, WIDE = 200_000, 200  # limits of rows and columns
TEXT, FIELD = 5_000, 20_000  # limits in characters, of a prompt and of any other field
REASON = 300  # characters of another library's error
SEEDS, GUIDANCE, SIDES = (0, 2**63 - 1), (0, 1000), (8, 8192)  # from, to

Number = TypeVar("Number", int, float)
_Row = tuple[int, Mapping[str, str]]  # its number, and column → text


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and how it is to be sampled.

    Args:
        text: As it stands in the file.
        seed, guidance, width, height: None where the file has no such column or the row no value; sides in pixels.
        labels: Column → its value in this row, of the columns that tell what the prompt shows (`LABELS`), such as
            {"artist": "Van Gogh"}.
        row: From 1, as a spreadsheet counts, so that the first prompt of a table has row 2; of a text file the line.
        id: What the file calls the prompt, such as its `case_number`.
    """

    text: str
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    row: int = 0
    id: str | None = None


@dataclass(frozen=True)
class PromptList:
    """The prompts of a file or a data set.

    Args:
        empty: How many rows are skipped because their prompt is empty, as one is in common copies of I2P.
        revision: Commit of a data set of the hub; None where it is not known, and of a file.
    """

    rows: list[PromptRow]
    empty: int = 0
    revision: str | None = None


def read_prompts(path: Path | str) -> PromptList:
    """The prompts of a CSV file, whose columns are found by their names, or of a text file with one on each line.

    Args:
        path: `.csv` or `.tsv`, separated by commas, semicolons or tabs; or `.txt`, whose blank lines do not count. In
            UTF-8, untrusted.

    Raises:
        DataError: It cannot be read, has no prompt or no column of them, or a row that is invalid; says which row and
            column.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*TABLES, LINES):
        raise DataError(
            f"{path} has the ending {kind!r}, but prompts are read from {', '.join(TABLES)} and {LINES}",
            advice="Export it as CSV in UTF-8",
        )
    content = _content(path)
    if kind == LINES:
        lines = enumerate(content.split("\n"), 1)
        return _prompts(((i, {"": text.removesuffix("\r")}) for i, text in lines if text.strip()), {"text": ""}, path)
    mark, header = _separated(content)
    return _prompts(_rows(content, mark, header, path), _columns(header, path), path)


def prompts_of_hub(repo: str, revision: str | None = None) -> PromptList:
    """The prompts of a data set of the Hugging Face hub, by the same names of columns.

    Of several texts in a row, such as the captions of an image of COCO, the first is its prompt.

    Args:
        repo: Its id there, such as "AIML-TUDA/i2p". The split to read may follow it, or the revision, after a colon;
            by default it is train, or else the only one.
        revision: Branch, tag or commit; None for the newest.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be fetched or its split is not clear, or as
            `read_prompts`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the prompts {repo!r} need the package datasets", advice=install_command("datasets")
        ) from error
    (repo, _, split), (revision, _, other) = repo.partition(":"), (revision or "").partition(":")
    of = {"revision": revision or None}
    with cache_without_network(repo) as answers:
        try:
            names = datasets.get_dataset_split_names(repo, **of)
            data = datasets.load_dataset(repo, split=_split(split or other, names, repo), **of)
        except DataError:
            raise
        except Exception as error:  # the library passes on the errors of its many back ends
            reason = " ".join(str(error).split())[:REASON].rstrip(".") or type(error).__name__
            raise DataError(
                f"the prompts {repo!r} could not be fetched: {reason}",
                advice=("Download" if answers else "Connect to the internet, or download")
                + " its CSV file and give that",
            ) from error
    columns, commit = _columns(data.column_names, repo), _commit(data)
    rows = data.select_columns(list(dict.fromkeys(columns.values())))  # so that images are not decoded
    texts = (
        {name: _as_text(_first(value) if name == columns["text"] else value) for name, value in values.items()}
        for values in rows
    )
    return replace(_prompts(enumerate(texts, 2), columns, repo), revision=commit or of["revision"])


def _split(given: str, names: Sequence[str], repo: str) -> str:
    """The split of a data set to read: the given one, train, or the only one. Raises DataError."""
    for split in (given or "train", *(names if len(names) == 1 and not given else ())):
        if split in names:
            return split
    raise DataError(
        f"the prompts {repo!r} have {f'no split {given!r}' if given else 'no split train'}, but {some(names, 10)}",
        advice=literal(f"Name one after a colon, as in {repo}:{names[0]}") if names else "",
    )


def _commit(data: Any) -> str | None:
    """The commit that a data set was fetched from, by the addresses of its files; None where they do not tell."""
    addresses = getattr(getattr(data, "info", None), "download_checksums", None) or {}
    commits = {match[1] for address in addresses if (match := re.search("@([0-9a-f]{40})/", str(address)))}
    return commits.pop() if len(commits) == 1 else None


def _content(path: Path) -> str:
    """The text of the file. Raises DataError."""
    try:
        content = read_text(path, FILE_BYTES)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 (byte {error.start:,})", advice="Save it as CSV in UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise DataError(f"{path} has a NUL character in line {line:,}", advice="Save it as CSV in UTF-8")
    return content


def _table(content: str, mark: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(content, newline=""), delimiter=mark, strict=True)


def _separated(content: str) -> tuple[str, list[str]]:
    """The separator by which the header has the most columns that are read, and the header."""
    headers: dict[str, list[str]] = {}
    for mark in DELIMITERS:
        try:
            headers[mark] = next(_table(content, mark), [])
        except csv.Error:
            headers[mark] = []
    mark = max(headers, key=lambda each: (len(KNOWN & set(map(_plain, headers[each]))), len(headers[each])))
    return mark, headers[mark]


def _rows(content: str, mark: str, header: Sequence[str], path: Path) -> Iterator[_Row]:
    """The rows below the header. Raises DataError for one of another length, or that cannot be separated."""
    row = 0
    try:
        for row, fields in enumerate(_table(content, mark), 1):
            if row == 1 or not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}: row {row:,} has {len(fields)} fields, but the header has {len(header)} columns",
                    advice="Put a field that contains the separator into double quotes",
                )
            yield row, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}: the fields of row {row + 1:,} cannot be separated ({error})", advice="Check its double quotes"
        ) from error


def _plain(name: str) -> str:
    return name.strip().casefold()


def _columns(header: Sequence[str], where: Path | str) -> dict[str, str]:
    """Field of `PromptRow`, or label → the name of its column. Raises DataError."""
    if len(header) > WIDE:
        raise DataError(f"{where} has {len(header):,} columns; the limit is {WIDE}")
    present: dict[str, str] = {}
    for name in header:
        if _plain(name) in present and _plain(name) in KNOWN:
            raise DataError(f"{where} has two columns {_plain(name)!r}", advice="Rename or remove one of them")
        present[_plain(name)] = name
    first = {each: next((name for name in names if name in present), None) for each, names in COLUMNS.items()}
    if first["text"] is None:
        listed = some([repr(name[:40]) for name in header if name.strip()], 20) or "none"
        raise DataError(
            f"{where} has no column of prompts; its columns: {listed}",
            advice=f"Name the column of prompts {', '.join(COLUMNS['text'][:-1])} or {COLUMNS['text'][-1]}",
        )
    columns = {each: present[name] for each, name in first.items() if name is not None}
    return columns | {label: present[label] for label in LABELS if label in present}


def _prompts(rows: Iterable[_Row], columns: Mapping[str, str], where: Path | str) -> PromptList:
    """The rows with their numbers, those with an empty prompt skipped. Raises DataError."""
    prompts, empty = [], 0
    for count, (row, values) in enumerate(rows):
        if count == ROWS:
            raise DataError(f"{where} has more than {ROWS:,} rows, which is the limit", advice="Split it")
        if values[columns["text"]].strip():
            prompts.append(_prompt(values, columns, row, f"{where}: row {row:,} has"))
        else:
            empty += 1
    if not prompts:
        raise DataError(f"{where} has no prompt", advice="Give a file with at least one")
    return PromptList(prompts, empty)


def _prompt(values: Mapping[str, str], columns: Mapping[str, str], row: int, has: str) -> PromptRow:
    """A row as data. has: "FILE: row 7 has", for messages. Raises DataError, which names the column."""
    for each, name in columns.items():
        limit = TEXT if each == "text" else FIELD
        if len(values[name]) > limit:
            raise DataError(
                f"{has} {len(values[name]):,} characters in the column {name!r}; the limit is {limit:,}",
                advice="Shorten the text",
            )

    def cell(each: str) -> str:
        return values[columns[each]].strip() if each in columns else ""

    def number(each: str, read: Callable[[str], Number | None], bounds: tuple[int, int]) -> Number | None:
        value = read(cell(each)) if cell(each) else None
        if cell(each) and (value is None or not bounds[0] <= value <= bounds[1]):
            kind = f"{'an integer' if read is _integer else 'a number'} from {bounds[0]} to {bounds[1]}"
            raise DataError(f"{has} {cell(each)[:40]!r} in the column {columns[each]!r}, which takes {kind}")
        return value

    return PromptRow(
        values[columns["text"]],
        number("seed", _integer, SEEDS),
        number("guidance", _decimal, GUIDANCE),
        number("width", _integer, SIDES),
        number("height", _integer, SIDES),
        {label: cell(label) for label in LABELS if cell(label)},
        row,
        cell("id") or None,
    )


def _integer(text: str) -> int | None:
    """The integer that a text is, None for another text; 7.0 is one, as pandas writes it."""
    match = re.fullmatch(r"\+?(\d{1,19})(\.0+)?", text, re.ASCII)
    return int(match[1]) if match is not None else None


def _decimal(text: str) -> float | None:
    """The number that a text is, None for another text."""
    try:
        return float(text)
    except ValueError:
        return None


def _first(value: Any) -> Any:
    """The first of several texts; any other value as it is."""
    return next(iter(value), None) if isinstance(value, list | tuple) else value


def _as_text(value: Any) -> str:
    """A value of a data set as a CSV file has it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    return "" if value is None or value != value else str(value)  # NaN is the only value unlike itself
