"""Files and folders that appear whole: written under a name that nobody can guess, and held while they are written.

A temporary name is `.NAME.TOKEN.tmp`. Whoever writes it holds a lock on it, which the system takes away when the
process ends: so what a killed process left is known from what another one writes right now, in whatever container.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from salun.errors import ModelError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY, ASIDE = ".tmp", ".old"
_QUIET = 600.0  # seconds without a change after which what cannot be locked (Windows, some networks) is left behind


@contextmanager
def atomic(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A file that appears at `path` only when complete: temporary name beside it, synced, renamed; removed on failure.

    size: bytes it will take, checked against the free disk first. Raises ModelError telling both, or why the file
    cannot be written.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ModelError(
                f"{path} needs {size:,} bytes, but its disk has {free:,} free: make room or write elsewhere"
            )
        with _new_file(path) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is held
                os.replace(temporary, path)
        if fcntl is None:  # an open file cannot be renamed there
            os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path), str(path.parent)):
            raise  # of what is done inside, such as reading another file
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary != path:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, held, to be renamed or removed; what is still there at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = _named(path)
        folder.mkdir()  # raises for any that is there, a link too
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
        if handle is None or _lock(handle, folder):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def aside_of(temporary: Path) -> Path:
    """Where what has the name is moved until `temporary` has it."""
    return temporary.with_suffix(ASIDE)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while writing `path` have left beside it."""
    for leftover in _beside(path, TEMPORARY):
        if abandoned(leftover):
            _remove(leftover)


def moved_aside(path: Path) -> list[Path]:
    """What killed processes have moved aside to give `path` another content."""
    return [each for each in _beside(path, ASIDE) if not os.path.lexists(each.with_suffix(TEMPORARY))]


def abandoned(temporary: Path) -> bool:
    """Whether nobody holds a temporary file or folder."""
    if fcntl is None:
        return _unchanged(temporary)
    try:
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone by now, a link, or another user's
        return temporary.is_symlink()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return _unchanged(temporary)
    finally:
        os.close(handle)
    return True


def _named(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A new temporary file for `path`, open and held. It never is one that was there, nor where a link leads."""
    while True:
        temporary = _named(path)
        with temporary.open("xb") as file:
            if fcntl is None or _lock(file.fileno(), temporary):
                yield file
                return


def _lock(handle: int, temporary: Path) -> bool:
    """Hold what was just made. False if another process took it for a leftover before that."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: `_unchanged` tells there
        pass
    return temporary.exists()


def is_temporary(path: Path, ending: str = TEMPORARY) -> bool:
    """Whether a name is one that `_named` gives; other people's hidden files are not ours to remove."""
    return re.search(rf"^\..+\.[0-9a-f]{{16}}{re.escape(ending)}$", path.name) is not None


def _beside(path: Path, ending: str) -> list[Path]:
    return [p for p in path.parent.glob(f".{glob.escape(path.name)}.*{ending}") if is_temporary(p, ending)]


def _unchanged(temporary: Path) -> bool:
    """Whether nothing in a file or folder was written to for a while."""
    try:
        inner = temporary.rglob("*") if temporary.is_dir() else ()
        last: float = max(each.lstat().st_mtime for each in (temporary, *inner))
    except OSError:  # it changes right now
        return False
    return bool(time.time() - last > _QUIET)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):  # another process removed it
            place.unlink(missing_ok=True)
