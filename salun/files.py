"""Atomic writing of files and folders: temporary names, renames, leftovers; digests and disk space."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from salun.errors import ConfigError, ModelError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY, ASIDE = ".tmp", ".old"
MAKE_ROOM = "Free disk space, or write to another disk"
EXISTS = "Choose another name, or use {force}"
_CHUNK = 8 * 1024 * 1024  # bytes read at a time
_QUIET = 600.0  # seconds without a change after which what cannot be locked (Windows, some networks) is left behind


@contextmanager
def atomic(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Context manager: a file that appears at `path` only when complete; a temporary one is synced and renamed.

    size: bytes it will take, checked against the free disk first. Raises ModelError telling both, or why the file
    cannot be written.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ModelError(f"{final(path)} needs {size:,} bytes, but its disk has {free:,} free", advice=MAKE_ROOM)
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
        raise ModelError(f"{final(path)} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary != path:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Context manager: a new locked folder next to `path`, removed at the end if it was not renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = _named(path)
        folder.mkdir()  # raises for any that is there, a link too
        try:
            handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
        except FileNotFoundError:  # another process took it for a leftover before it was held
            continue
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
    """The path to which an existing target is moved until `temporary` has its name."""
    return temporary.with_suffix(ASIDE)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed processes left next to `path`."""
    for leftover in _siblings(path, TEMPORARY):
        remove_abandoned(leftover)


def moved_aside(path: Path) -> list[Path]:
    """What killed processes have moved aside to give `path` another content."""
    return [each for each in _siblings(path, ASIDE) if not os.path.lexists(each.with_suffix(TEMPORARY))]


def abandoned(temporary: Path) -> bool:
    """Whether nobody holds a temporary file or folder."""
    with _claimed(temporary) as free:
        return free


def remove_abandoned(temporary: Path) -> None:
    """Remove a temporary file or folder that nobody holds. (It is held meanwhile, so that nobody begins to use it.)"""
    with _claimed(temporary) as free:
        if free:
            _remove(temporary)


@contextmanager
def _claimed(temporary: Path) -> Iterator[bool]:
    """Context manager: holds a temporary file or folder; False if another process does."""
    if fcntl is None:
        yield _unchanged(temporary)
        return
    try:
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone by now, a link, or another user's
        yield temporary.is_symlink()
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = _unchanged(temporary)
        yield free
    finally:
        os.close(handle)


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
    """Lock a new file or folder. False if another process removed it as a leftover before that."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: `_unchanged` decides there
        pass
    return temporary.exists()


def is_temporary(path: Path, ending: str = TEMPORARY) -> bool:
    """Whether a name is one that `_named` gives; other hidden files are never removed."""
    return re.search(rf"^\..+\.[0-9a-f]{{16}}{re.escape(ending)}$", path.name) is not None


def final(path: Path) -> Path:
    """The path that a file in a temporary folder will have, for people."""
    for folder in path.parents:
        if is_temporary(folder, TEMPORARY):
            inner, target = path.relative_to(folder), folder.with_name(folder.name[1:].rsplit(".", 2)[0])
            return target if inner == Path(target.name) else target / inner
    return path


def _siblings(path: Path, ending: str) -> list[Path]:
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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of any kind, atomically."""
    with atomic(path, len(content)) as file:
        file.write(content)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(_CHUNK):
        digest.update(block)
    return digest.hexdigest()


def recover_interrupted_write(target: Path) -> None:
    """Remove what killed processes left next to `target`; restore a folder that one of them had moved aside."""
    remove_leftovers(target)
    for moved in moved_aside(target):  # killed before its last rename, or after it
        if os.path.lexists(target):
            _remove(moved)
        else:
            os.replace(moved, target)


@contextmanager
def placed(target: Path, force: bool = False, again: bool = False) -> Iterator[Path]:
    """Context manager: a path to write to, which becomes `target` at the end, without `force` only if that is free.

    (Another process may create `target` in the meantime.)

    Args:
        again: Accept a target with the same bytes, of a run that stopped after writing it.

    Raises:
        ConfigError: Something else is there; it is left as it is.
    """
    if force:
        yield target
        return
    recover_interrupted_write(target)
    try:
        with temporary_folder(target) as folder:
            yield folder / target.name
            if not (again and target.exists() and _contents(folder / target.name) == _contents(target)):
                _place(folder / target.name, target)
    except FileExistsError as error:
        raise ConfigError(f"{target} already exists", advice=EXISTS, code="exists") from error
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error


def _contents(path: Path) -> dict[str, str]:
    """sha256 of a file, or of each in a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def _place(made: Path, target: Path) -> None:
    """Rename a file or folder to its final name. Raises FileExistsError if that exists."""
    if made.is_file():
        try:
            os.link(made, target)  # of all that give a name, this never replaces
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            pass
    if os.path.lexists(target):
        raise FileExistsError(str(target))
    os.rename(made, target)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Context manager: a temporary folder that replaces `target` at the end, complete.

    Raises:
        ModelError: It cannot be written. Nothing of it is left then, and `target` is as it was.
    """
    target = target.absolute()
    try:
        recover_interrupted_write(target)
        with temporary_folder(target) as temporary:
            yield temporary
            _sync(temporary)
            _swap(temporary, target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}", advice=MAKE_ROOM) from error


def _swap(temporary: Path, target: Path) -> None:
    """Rename a folder to its final name; an existing one is moved aside first, and removed at the end."""
    aside = aside_of(temporary)
    if os.path.lexists(target):
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:  # also on an interrupt: restore the previous content
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.replace(aside, target)
        raise
    _remove(aside)


def _sync(folder: Path) -> None:
    """Have the disk hold every file of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file, suppress(OSError):
                os.fsync(file.fileno())


def check_result_folder(folder: Path, names: Sequence[str]) -> None:
    """Check that files of these names can be written into a folder. Raises ConfigError if they cannot."""
    paths = [folder / name for name in names]
    taken = [path for path in paths if path.is_dir()]
    if (folder.exists() and not folder.is_dir()) or taken:
        raise ConfigError(
            f"is {folder}, " + (f"in which {taken[0].name} is a folder" if taken else "which is not a folder"),
            option="output",
            advice="Name another folder, which need not exist",
        )
    check_disk_space(dict.fromkeys(paths, 0))


def check_disk_space(needed: Mapping[Path, int]) -> None:
    """Raises ConfigError if an existing or future path cannot be written to, or its disk has too little space.

    needed: file or folder → bytes, which are added up for each disk.
    """
    disks: dict[int, list[tuple[Path, int]]] = {}
    for place, size in needed.items():
        absolute = place.absolute()
        above = [absolute, *absolute.parents] if absolute.is_dir() else list(absolute.parents)
        folder = next(p for p in above if p.exists())
        if not folder.is_dir():
            raise ConfigError(f"{place} cannot be created: {folder} is not a folder")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"{place} cannot be written: {error.strerror or error}") from error
        disks.setdefault(folder.stat().st_dev, []).append((folder, size))
        free, wanted = shutil.disk_usage(folder).free, sum(size for _, size in disks[folder.stat().st_dev])
        if free < wanted:
            raise ConfigError(
                f"{place}: up to {wanted / 1e9:.2f} GB will be written, but its disk has {free / 1e9:.2f} GB free",
                advice=MAKE_ROOM,
                code="no-space",
            )
