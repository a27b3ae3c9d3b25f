"""Where nodes write: names that are free, inside ComfyUI's folders; and what they keep for the next run."""

from __future__ import annotations

import os
from pathlib import Path

from salun.cache import DEFAULT_LIMIT, Cache, size_of
from salun.errors import ConfigError


def output_path(prefix: str, kind: str, ending: str) -> tuple[Path, str]:
    """A free path in `output/<kind>`, and its name as lists of models show it. Its folder is there afterwards.

    kind: "checkpoints", "loras", "salun". Raises ConfigError for a prefix that leads out of the folder.
    """
    import folder_paths

    root = Path(folder_paths.get_output_directory()).resolve() / kind
    name = prefix.replace("\\", "/").strip()
    if not name or name.startswith("/") or name.endswith("/") or ".." in Path(name).parts or ":" in name:
        raise ConfigError(f"filename_prefix is {prefix!r}: give a name, or folder/name, inside output/{kind}")
    root.mkdir(parents=True, exist_ok=True)
    folder, base, counter, _, _ = folder_paths.get_save_image_path(name, str(root))
    place = Path(folder).resolve()
    if root not in (place, *place.parents):
        raise ConfigError(f"filename_prefix is {prefix!r}: it leads out of output/{kind}")
    while (path := place / f"{base}_{counter:05}_{ending}").exists():
        counter += 1
    return path, path.relative_to(root).as_posix()


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


def _files(kind: str, endings: tuple[str, ...]) -> dict[str, Path]:
    import folder_paths

    files: dict[str, Path] = {}
    for root in (Path(folder_paths.get_output_directory()) / kind, Path(folder_paths.get_input_directory())):
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_file() and path.name.endswith(endings):
                files.setdefault(path.relative_to(root).as_posix(), path)
    return files


def cache() -> Cache:
    """What nodes keep on disk, so that the same work is not done twice, not even after a restart."""
    import folder_paths

    own = os.environ.get("SALUN_CACHE")
    folder = Path(own).expanduser() if own else Path(folder_paths.get_user_directory()) / "salun" / "cache"
    return Cache(folder, size_of(os.environ.get("SALUN_CACHE_SIZE", str(DEFAULT_LIMIT))))
