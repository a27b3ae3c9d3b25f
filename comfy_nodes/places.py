"""Where nodes write: names that are free, inside ComfyUI's folders; and what they keep for the next run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from salun.errors import ConfigError, SalunError
from salun.masking.mask import Mask
from salun.masking.training_state import read_saved_history
from salun.runs.cache import DEFAULT_LIMIT, Cache, size_of
from salun.runs.folder import STATE, check_folder, exclusive_lock

LISTED = ("checkpoints", "loras")  # kinds that ComfyUI has lists of, from several folders each
LONGEST = 200  # bytes of a name that a number and an ending are added to; file systems take 255


def checked_prefix(prefix: str, kind: str) -> str:
    """A prefix as the name that it stands for; touches nothing, so that a bad one is refused before the work.

    kind: "checkpoints", "loras", "salun". Raises ConfigError for a prefix that leads out of `output/<kind>` or that no
    file can have. (That is a matter of the name: the folders themselves may be links to another disk, as the user has
    set them up.)
    """
    name = prefix.replace("\\", "/").strip()
    parts = Path(name).parts
    if not name or name.startswith("/") or name.endswith("/") or ".." in parts or ":" in name:
        raise ConfigError(f"filename_prefix is {prefix!r}: give a name, or folder/name, inside output/{kind}")
    if not name.isprintable() or any(len(part.encode()) > LONGEST for part in parts):
        raise ConfigError(f"filename_prefix is {prefix[:80]!r}: no file can have that name")
    above = _root(kind)
    for part in parts[:-1]:
        above /= part
        if os.path.lexists(above) and not above.is_dir():
            raise ConfigError(f"filename_prefix is {prefix!r}: {part!r} in output/{kind} is no folder")
    return name


def validated(prefix: str | None, kind: str, others: Callable[[], object] = lambda: None) -> bool | str:
    """A saver's answer to ComfyUI's VALIDATE_INPUTS, asked before anything runs: True, or what is wrong.

    prefix: None where another node will give it, in which case it is checked when it is there. others: raises
    SalunError if another input is wrong.
    """
    try:
        if prefix is not None:
            checked_prefix(prefix, kind)
        others()
    except SalunError as error:
        return str(error)
    return True


def output_path(prefix: str, kind: str, ending: str) -> tuple[Path, str]:
    """A free path in `output/<kind>`, and its name as lists of models show it. Its folder is there afterwards.

    kind, and ConfigError, as in `checked_prefix`.
    """
    import folder_paths

    root = _root(kind)
    name = checked_prefix(prefix, kind)
    root.mkdir(parents=True, exist_ok=True)
    folder, base, counter, _, _ = folder_paths.get_save_image_path(name, str(root))
    place = Path(os.path.abspath(folder))
    if root not in (place, *place.parents):
        raise ConfigError(f"filename_prefix is {prefix!r}: it leads out of output/{kind}")
    while True:
        path = place / f"{base}_{counter:05}_{ending}"
        shown = path.relative_to(root).as_posix()
        # one of the same name in another folder of ComfyUI's, such as models/, would be the one that loaders find
        if not os.path.lexists(path) and (kind not in LISTED or folder_paths.get_full_path(kind, shown) is None):
            return path, shown
        counter += 1


def _root(kind: str) -> Path:
    import folder_paths

    return Path(os.path.abspath(folder_paths.get_output_directory())) / kind


def saved(kind: str, endings: tuple[str, ...]) -> list[str]:
    """Names of files of ours in `output/<kind>` and `input`, newest first, for a list to choose from."""
    found = [(path.stat().st_mtime, name) for name, path in _files(kind, endings).items()]
    return [name for _, name in sorted(found, reverse=True)]


def chosen(name: str, kind: str, endings: tuple[str, ...]) -> Path:
    """The file behind a name of `saved`. Raises ConfigError if it is not there."""
    found = _files(kind, endings).get(name)
    if found is None:
        raise ConfigError(f"{name!r} is not in output/{kind} or input any more: press R to refresh the lists")
    return found


def state_of(name: str, endings: tuple[str, ...]) -> str:
    """What changes when the file behind a name of `saved` does, for ComfyUI's own cache."""
    try:
        path = chosen(name, "salun", endings)
    except ConfigError:
        return "gone"
    facts = path.stat()
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def _files(kind: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """Name → file. Linked folders are gone into, as ComfyUI's own lists do; of two files of one name, that in `input`
    is called `name [input]`.
    """
    import folder_paths

    files: dict[str, Path] = {}
    for root in (Path(folder_paths.get_output_directory()) / kind, Path(folder_paths.get_input_directory())):
        been = {os.path.realpath(root)}
        for folder, folders, names in os.walk(root, followlinks=True):
            folders[:] = sorted(each for each in folders if os.path.realpath(Path(folder) / each) not in been)
            been.update(os.path.realpath(Path(folder) / each) for each in folders)
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(endings) and path.is_file():
                    shown = path.relative_to(root).as_posix()
                    files[shown if shown not in files else f"{shown} [input]"] = path
    return files


def cache() -> Cache:
    """What nodes keep on disk, so that the same work is not done twice, not even after a restart."""
    import folder_paths

    own = os.environ.get("SALUN_CACHE")
    folder = Path(own).expanduser() if own else Path(folder_paths.get_user_directory()) / "salun" / "cache"
    return Cache(folder, size_of(os.environ.get("SALUN_CACHE_SIZE", str(DEFAULT_LIMIT))))


def unfinished(fingerprint: str, needed: int) -> Path | None:
    """The folder of an erasure that may be stopped and gone on with, by its record's fingerprint.

    What a stopped one has left there is taken up if it is sound, and has its room; those of others are removed, for
    they are large. None without a cache, where the disk has no room for what is `needed`, or where another ComfyUI is
    at work on this very erasure.
    """
    store = cache()
    if not store.limit:
        return None
    root = store.folder / "unfinished"
    own = root / fingerprint
    taken_up = own.is_dir() and _sound(own, fingerprint)
    for other in root.iterdir() if root.is_dir() else ():
        if other == own and taken_up:
            continue
        with suppress(ConfigError):  # another ComfyUI is at work there
            with exclusive_lock(other):
                shutil.rmtree(other / STATE, ignore_errors=True)
            shutil.rmtree(other, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not taken_up and shutil.disk_usage(root).free <= needed:
            return None
        with exclusive_lock(own):
            return own
    except (OSError, ConfigError):
        return None


def _sound(folder: Path, fingerprint: str) -> bool:
    try:
        check_folder(folder, resume=True)
        read_saved_history(folder / STATE / "training.safetensors", fingerprint)
        mask = folder / STATE / "mask.safetensors"
        return not mask.exists() or Mask.load(mask).total > 0
    except SalunError:
        return False
