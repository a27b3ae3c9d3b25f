"""Names from forms and requests, confined to the folders meant for them; texts that tell no place of this machine."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from salun.errors import ConfigError

LONGEST = 60  # characters of a file's name, without its ending
READ = 1_000  # characters of a text from which a name is made
SHORTEST = 12  # of a model's name in that of what was made of it
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # Windows'


def confined(name: str, root: Path) -> Path:
    """The existing file or folder of this name below `root`; parts of the name are separated by "/".

    Raises ConfigError for an absolute name, one with `..`, a drive, a backslash or control characters (also as what
    Unicode holds to be the same letters), one that is not there, and one that a link leads out of `root`.
    """
    whole = root.resolve()
    place = whole.joinpath(*_parts(name))
    try:
        found = place.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"there is no {name!r} here") from error
    if found == whole or not found.is_relative_to(whole):
        raise ConfigError(f"{name!r} leads out of the folder it should be in")
    return found


def confined_file(name: str, root: Path) -> Path:
    """The same of a regular file: to read a named pipe or a device would wait for ever. Raises ConfigError."""
    place = confined(name, root)
    if not place.is_file():
        raise ConfigError(f"there is no {name!r} here: what has this name is not a regular file")
    return place


def _parts(name: str) -> list[str]:
    if len(name) > READ:
        raise ConfigError(f"a name has {len(name):,} characters; the limit is {READ:,}. Shorten it.")
    for form in (name, unicodedata.normalize("NFKC", name)):
        parts = form.split("/")
        bad = any(c in '\\:*?"<>|' or unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in form)
        if bad or any(p in ("", ".", "..") or p.endswith((".", " ")) or p.startswith(" ") for p in parts):
            raise ConfigError(f"{name!r} cannot be a name here: use letters, digits, spaces, dots and dashes")
        if any(part.split(".")[0].casefold() in _RESERVED for part in parts):
            raise ConfigError(f"{name!r} is a name that Windows keeps for itself")
    return name.split("/")


def safe_name(text: str, otherwise: str = "erased") -> str:
    """A file name, without ending, that every system allows, made of a text and cut where it is too long."""
    kept = _plain(text)[:LONGEST].strip("-_")
    return otherwise if not kept or kept.casefold() in _RESERVED else kept


def own_name(text: str) -> str:
    """The same of a name that a person gave, which is never cut. Raises ConfigError for one that cannot be had."""
    if len(text) > READ:
        raise ConfigError(f"the name has {len(text):,} characters; the limit is {LONGEST}. Shorten it.")
    plain = _plain(text)
    if not safe_name(plain, ""):
        raise ConfigError(f"no file can be called {text[:80]!r} on every system: use a-z, digits, dashes")
    if len(plain) > LONGEST:
        raise ConfigError(f"the name {text[:80]!r} is too long: give one of {LONGEST} characters at most")
    return plain


def made_name(first: str, rest: str, after: str = "") -> str:
    """A file name of a model's name, what was done to it, and an ending. Where that is too long the model's is cut."""
    kept = safe_name(rest)[: LONGEST - len(after) - SHORTEST - 1].rstrip("-_")
    return f"{safe_name(first)[: LONGEST - len(after) - len(kept) - 1].rstrip('-_')}-{kept}{after}"


def _plain(text: str) -> str:
    text = text[:READ]  # what Unicode makes of it can take the square of its length
    return re.sub(r"[^A-Za-z0-9_-]+", "-", unicodedata.normalize("NFKD", text)).strip("-_")


def new_file(folder: Path, stem: str, ending: str, promised: Iterable[str] = ()) -> Path:
    """A file's path in `folder` that nothing has yet: a host would go on using the old content of one that has.

    promised: paths that others will write.
    """
    taken = {p.name.casefold() for p in folder.iterdir()} if folder.is_dir() else set()
    taken |= {Path(path).name.casefold() for path in promised}
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
    """A text without the places of these folders: what lies in one is called from there on, a folder itself by name."""
    whole = {spelt for folder in folders for spelt in (folder, Path(os.path.realpath(folder)))}
    for place in sorted((one for one in whole if one.name), key=lambda one: len(str(one)), reverse=True):
        for between in (os.sep, os.sep + os.sep):  # the second on Windows, as repr does
            spelt = re.escape(str(place).replace(os.sep, between))
            text = re.sub(rf"(?<![\w.]){spelt}{re.escape(between)}", "", text)
            text = re.sub(rf"(?<![\w.]){spelt}(?![\w-])", place.name.replace("\\", "\\\\"), text)
    return text


def displayable(name: str) -> bool:
    """Whether a page can show a file's name: one that is no UTF-8 cannot be written as JSON."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def displayed(name: str) -> str:
    """A file's name as a page can show it: bytes that are not UTF-8 as escapes, which name no file."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
