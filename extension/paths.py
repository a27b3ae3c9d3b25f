"""File names from forms and requests, confined to their folders; texts without paths of this machine."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from salun.errors import ConfigError

MAX_NAME = 60  # characters of a file's name, without its ending
MAX_READ = 1_000  # characters of a text from which a name is made
MIN_MODEL_NAME = 12  # characters of the model's name in such a name
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # Windows'


def confined(name: str, root: Path) -> Path:
    """The existing file or folder of this name below `root`; parts of the name are separated by "/".

    Raises ConfigError for a name that is absolute, has `..`, a drive, a backslash or control characters (also as
    equivalent Unicode characters), does not exist, or is a link out of `root`.
    """
    base = root.resolve()
    place = base.joinpath(*_parts(name))
    try:
        resolved = place.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"there is no {name!r} here", code="not-found") from error
    if resolved == base or not resolved.is_relative_to(base):
        raise ConfigError(f"{name!r} is outside the folder that it must be in")
    return resolved


def confined_file(name: str, root: Path) -> Path:
    """As `confined`, for a regular file: reading a named pipe or a device might never end."""
    place = confined(name, root)
    if not place.is_file():
        raise ConfigError(f"there is no {name!r} here: it is not a regular file", code="not-found")
    return place


def _parts(name: str) -> list[str]:
    if len(name) > MAX_READ:
        raise ConfigError(f"a name has {len(name):,} characters; the limit is {MAX_READ:,}", advice="Shorten it")
    for form in (name, unicodedata.normalize("NFKC", name)):
        parts = form.split("/")
        bad = any(c in '\\:*?"<>|' or unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in form)
        if bad or any(p in ("", ".", "..") or p.endswith((".", " ")) or p.startswith(" ") for p in parts):
            raise ConfigError(f"{name!r} cannot be a name here", advice="Use letters, digits, spaces, dots and dashes")
        if any(part.split(".")[0].casefold() in _RESERVED for part in parts):
            raise ConfigError(f"{name!r} cannot be a name here: Windows reserves it")
    return name.split("/")


def safe_name(text: str, otherwise: str = "erased") -> str:
    """A file name without ending that every system allows, made of a text and truncated."""
    cut = _plain(text)[:MAX_NAME].strip("-_")
    return otherwise if not cut or cut.casefold() in _RESERVED else cut


def given_name(text: str) -> str:
    """As `safe_name`, for a name that a user gave, which is not truncated. Raises ConfigError if it is unusable."""
    if len(text) > MAX_READ:
        raise ConfigError(f"the name has {len(text):,} characters; the limit is {MAX_NAME}", advice="Shorten it")
    plain = _plain(text)
    if not safe_name(plain, ""):
        raise ConfigError(f"{text[:80]!r} cannot be a file name on every system", advice="Use a-z, digits and dashes")
    if len(plain) > MAX_NAME:
        raise ConfigError(f"the name {text[:80]!r} has {len(plain)} characters; the limit is {MAX_NAME}",
                          advice="Shorten it")  # fmt: skip
    return plain


def made_name(model: str, change: str, stamp: str = "") -> str:
    """A file name made of a model's name, a change and a time stamp; the model's name is truncated if necessary."""
    end = safe_name(change)[: MAX_NAME - len(stamp) - MIN_MODEL_NAME - 1].rstrip("-_")
    return f"{safe_name(model)[: MAX_NAME - len(stamp) - len(end) - 1].rstrip('-_')}-{end}{stamp}"


def _plain(text: str) -> str:
    text = text[:MAX_READ]  # normalizing can take quadratic time
    return re.sub(r"[^A-Za-z0-9_-]+", "-", unicodedata.normalize("NFKD", text)).strip("-_")


def new_file(folder: Path, stem: str, ending: str, reserved: Iterable[str] = ()) -> Path:
    """A new file's path in `folder`: a host would keep using the old content of an existing one.

    reserved: paths that other jobs will write.
    """
    taken = {p.name.casefold() for p in folder.iterdir()} if folder.is_dir() else set()
    taken |= {Path(path).name.casefold() for path in reserved}
    for name in _counted(safe_name(stem)):
        if f"{name}{ending}".casefold() not in taken:
            return folder / f"{name}{ending}"
    raise AssertionError  # counting has no end


def _counted(stem: str) -> Iterator[str]:
    yield stem
    n = 2
    while True:
        yield f"{stem}-{n}"
        n += 1


def without_folders(text: str, folders: Iterable[Path]) -> str:
    """A text with paths in these folders made relative, and the folders replaced by their names."""
    spellings = {path for folder in folders for path in (folder, Path(os.path.realpath(folder)))}
    for folder in sorted((path for path in spellings if path.name), key=lambda path: len(str(path)), reverse=True):
        for separator in (os.sep, os.sep + os.sep):  # the second on Windows, as repr does
            spelled = re.escape(str(folder).replace(os.sep, separator))
            text = re.sub(rf"(?<![\w.]){spelled}{re.escape(separator)}", "", text)
            text = re.sub(rf"(?<![\w.]){spelled}(?![\w-])", folder.name.replace("\\", "\\\\"), text)
    return text


def displayable(name: str) -> bool:
    """Whether a page can show a file's name: a name that is not UTF-8 cannot be written as JSON."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def displayed(name: str) -> str:
    """A file's name as a page can show it; bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
