"""Paths of the nodes' files: free names inside ComfyUI's output folder, and lists of saved files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from salun.errors import ConfigError, SalunError

SAFETENSORS = ".safetensors"
LISTED = ("checkpoints", "loras")  # folders of which ComfyUI has lists, each from several roots
LONGEST = 200  # bytes of a name before a number and an ending are added; file systems take 255


def checked_prefix(prefix: str, folder: str) -> str:
    """A filename prefix, normalized; nothing is written, so that an invalid one is rejected before the work.

    Args:
        folder: Folder of the file inside `output`: "checkpoints", "loras" or "salun".

    Raises:
        ConfigError: The prefix leads out of `output/<folder>`, or no file can have that name. (Only the name counts:
            folders may be links to another disk.)
    """
    name = prefix.replace("\\", "/").strip()
    parts = Path(name).parts
    if not name or name.startswith("/") or name.endswith("/") or ".." in parts or ":" in name:
        raise _invalid(prefix, f"but must be a name, or folder/name, inside output/{folder}")
    if not name.isprintable() or any(len(part.encode()) > LONGEST for part in parts):
        raise _invalid(prefix[:80], "which is not a valid file name")
    above = _root(folder)
    for part in parts[:-1]:
        above /= part
        if os.path.lexists(above) and not above.is_dir():
            raise _invalid(prefix, f"but {part!r} in output/{folder} is a file, not a folder")
    return name


def _invalid(prefix: str, why: str) -> ConfigError:
    return ConfigError(f"is {prefix!r}, {why}", option="filename_prefix")


def validation(prefix: str | None, folder: str, others: Callable[[], object] = lambda: None) -> bool | str:
    """A node's answer to ComfyUI's VALIDATE_INPUTS, called before anything runs: True, or the error.

    Args:
        prefix: None where it comes from another node; then it is checked when the node runs.
        folder: As in `checked_prefix`.
        others: Raises SalunError if another input is invalid.
    """
    try:
        if prefix is not None:
            checked_prefix(prefix, folder)
        others()
    except SalunError as error:
        return str(error)
    return True


def output_path(prefix: str, folder: str, ending: str) -> tuple[Path, str]:
    """A free path in `output/<folder>`, whose folder is made, and its name as ComfyUI's lists show it.

    Raises ConfigError for an invalid prefix, as `checked_prefix` does.
    """
    import folder_paths

    root = _root(folder)
    name = checked_prefix(prefix, folder)
    root.mkdir(parents=True, exist_ok=True)
    target, base, counter, _, _ = folder_paths.get_save_image_path(name, str(root))
    parent = Path(os.path.abspath(target))
    if root not in (parent, *parent.parents):
        raise _invalid(prefix, f"which leads out of output/{folder}")
    while True:
        path = parent / f"{base}_{counter:05}_{ending}"
        shown = path.relative_to(root).as_posix()
        # loaders would find a file of the same name in another of ComfyUI's folders, such as models/, first
        if not os.path.lexists(path) and (folder not in LISTED or folder_paths.get_full_path(folder, shown) is None):
            return path, shown
        counter += 1


def _root(folder: str) -> Path:
    import folder_paths

    return Path(os.path.abspath(folder_paths.get_output_directory())) / folder


def checkpoint_names() -> list[str]:
    """ComfyUI's list of checkpoints."""
    import folder_paths

    return list(folder_paths.get_filename_list("checkpoints"))


def checkpoint_path(name: str) -> Path:
    """The file of a checkpoint in ComfyUI's list. Raises ConfigError for one that is missing or not .safetensors."""
    import folder_paths

    path = folder_paths.get_full_path("checkpoints", name)
    if path is None or not name.endswith(SAFETENSORS):
        raise ConfigError(
            f"{name} is not a {SAFETENSORS} checkpoint in ComfyUI's list", advice="Press R to refresh the lists"
        )
    return Path(path)


def saved_names(endings: tuple[str, ...]) -> list[str]:
    """Names of files in `output/salun` and `input`, newest first, as the choices of an input."""
    dated = [(path.stat().st_mtime, name) for name, path in _files(endings).items()]
    return [name for _, name in sorted(dated, reverse=True)]


def saved_path(name: str, endings: tuple[str, ...]) -> Path:
    """The file behind a name of `saved_names`. Raises ConfigError if it does not exist."""
    path = _files(endings).get(name)
    if path is None:
        raise ConfigError(f"{name!r} is not in output/salun or input", advice="Press R to refresh the lists")
    return path


def input_folder(name: str, option: str) -> Path:
    """A folder in ComfyUI's `input`, which may be a link. Raises ConfigError for one that is missing or elsewhere."""
    import folder_paths

    plain = name.replace("\\", "/")
    path = Path(folder_paths.get_input_directory()) / plain
    if not plain or plain.startswith("/") or ":" in plain or ".." in Path(plain).parts or not path.is_dir():
        raise ConfigError(f"names {name[:80]!r}, which is not a folder in input", option=option)
    return path


def file_state(name: str, endings: tuple[str, ...]) -> str:
    """A text that changes with the file behind a name of `saved_names`, for ComfyUI's cache."""
    try:
        path = saved_path(name, endings)
    except ConfigError:
        return "missing"
    facts = path.stat()
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def _files(endings: tuple[str, ...]) -> dict[str, Path]:
    """Name → file. Linked folders are followed, as in ComfyUI's lists.

    Of two files of the same name, that in `input` is named `name [input]`.
    """
    import folder_paths

    files: dict[str, Path] = {}
    for root in (Path(folder_paths.get_output_directory()) / "salun", Path(folder_paths.get_input_directory())):
        visited = {os.path.realpath(root)}
        for folder, folders, names in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if os.path.realpath(Path(folder) / name) not in visited)
            visited.update(os.path.realpath(Path(folder) / name) for name in folders)
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(endings) and path.is_file():
                    shown = path.relative_to(root).as_posix()
                    files[shown if shown not in files else f"{shown} [input]"] = path
    return files
