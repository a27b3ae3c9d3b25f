"""Resolves a model's name to a path: an alias, a path, a host's checkpoint or a hub id."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salun.checkpoints.diffusers_folder import files_under, weights_of
from salun.checkpoints.families.registry import NETWORK_PARTS
from salun.errors import ConfigError, ModelError
from salun.untrusted import read_json_object, read_yaml
from salun.user_text import as_spelled, composed, unquoted

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SETTINGS, LABELS = "salun.yaml", "labels.txt"
FILES = (".safetensors", ".ckpt")
HOST_FOLDERS = ("models/checkpoints", "models/Stable-diffusion", "checkpoints", "Stable-diffusion")
EXTRA_PATHS = "extra_model_paths.yaml"
MODELS_DIR = "Name folders to search in {models_dir}"
logger = logging.getLogger("salun")


@cache
def aliases() -> dict[str, Any]:
    """The alias table: `default`, `models` (alias → where it lies) and `families` (recipes and sampling defaults)."""
    table: dict[str, Any] = yaml.safe_load((ASSETS / "models.yaml").read_text(encoding="utf-8"))
    return table


class ModelNotFound(ModelError):
    """No model of this name was found."""

    def __init__(self, message: str, name: str, advice: str = "") -> None:
        super().__init__(message, code="not-found", advice=advice)
        self.name = name


def find(name: str, models_dir: Sequence[str] = (), *, unet: bool = True) -> tuple[Path, dict[str, Any]]:
    """A model's folder or single file, and its entry in the alias table (empty for others).

    unet: whether its weights are wanted too, which are most of a download.

    Looked for in this order: aliases; a path; a checkpoint of this name in the folders of `checkpoint_folders`; the
    hub, from which it is downloaded if necessary. Raises ModelError for a name that matches nothing or several files.
    """
    name, table = unquoted(name), aliases()["models"]
    entry = dict(table.get(name, {}))
    if "path" in entry:
        return ASSETS / entry["path"], entry
    if not entry:
        try:
            given = as_spelled(Path(name).expanduser()) if name else Path()
            there = bool(name) and given.exists()
        except (RuntimeError, OSError, ValueError) as error:  # no such user's home, a name too long, a NUL in it
            raise ModelError(f"{name[:80]!r} cannot be the name of a model: {error}") from error
        if there:
            return given, entry
        folders = list(checkpoint_folders(models_dir))
        checkpoint = _named(name, folders)
        if checkpoint is not None:
            return checkpoint, entry
        if name.endswith(FILES) or name.startswith((".", "/", "~")):
            where = f" and is in none of {', '.join(map(str, folders))}" if folders else ""
            raise ModelNotFound(f"{given} does not exist{where}", name, "" if folders else MODELS_DIR)
        if name.count("/") != 1:
            near = difflib.get_close_matches(name, table, 2)
            looked = f" (looked in {', '.join(map(str, folders))})" if folders else ""
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ModelNotFound(
                f"{name!r} is not a known model{looked}{hint}",
                name,
                "Use a name that `salun models` lists, a .safetensors file, a diffusers folder, a hub id (owner/name), "
                "or the name of a checkpoint in a folder of {models_dir}",
            )
    return _download(entry.get("repo", name), entry.get("variant"), unet), entry


def checkpoint_folders(models_dir: Sequence[str] = ()) -> Iterator[Path]:
    """The folders with checkpoints under those given and those of SALUN_MODELS_DIR (separated as in PATH).

    Each may be a folder of checkpoints, or the root of ComfyUI or of a WebUI; ComfyUI's `extra_model_paths.yaml`
    in it is followed. Raises ConfigError for a folder that is not there, or a file that cannot be read; a folder that
    the file names and that cannot be read is skipped, with a warning.
    """
    from_environment = [place for place in os.environ.get("SALUN_MODELS_DIR", "").split(os.pathsep) if place]
    seen = set()
    for place in [*models_dir, *from_environment]:
        root = as_spelled(Path(unquoted(place)).expanduser())
        if not os.path.isdir(root):
            raise ConfigError(
                f"is {place}, which is not a folder",
                option="models_dir",
                advice="Give a folder of checkpoints, or the root folder of a WebUI or ComfyUI",
            )
        inner = [root / part for part in HOST_FOLDERS if os.path.isdir(root / part)]
        if os.path.isfile(root / EXTRA_PATHS):
            inner += _extra_paths(root / EXTRA_PATHS)
        for folder in inner or [root]:
            if os.path.realpath(folder) not in seen:
                seen.add(os.path.realpath(folder))
                yield folder


def _extra_paths(file: Path) -> list[Path]:
    """The checkpoint folders that ComfyUI's extra_model_paths.yaml adds."""
    try:
        table = read_yaml(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    paths = []
    for section in table.values() if isinstance(table, Mapping) else ():
        listed = section.get("checkpoints") if isinstance(section, Mapping) else None
        if not isinstance(listed, str):
            continue
        base = file.parent / os.path.expanduser(os.path.expandvars(str(section.get("base_path") or "").strip()))
        paths += [base / line.strip() for line in listed.splitlines() if line.strip()]
    return [folder for folder in paths if _readable(folder, file)]


def _readable(folder: Path, file: Path) -> bool:
    """Whether a folder can be listed. One that is missing is skipped in silence, as ComfyUI does."""
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("%s names a folder that cannot be read and is skipped: %s (%s)", file, folder, reason)
        return False
    return True


def _named(name: str, folders: Sequence[Path]) -> Path | None:
    """The one checkpoint of this name: its path below a folder, its file's name, or that without its ending.

    Raises ModelError if several have it.
    """
    wanted = composed(name.replace("\\", "/")).casefold()
    matches: dict[str, Path] = {}
    for folder in folders:
        for path in (p for p in files_under(folder) if p.suffix.lower() in FILES):
            below = composed(path.relative_to(folder).as_posix()).casefold()
            last = below.rsplit("/", 1)[-1]
            names = {below, below.rsplit(".", 1)[0], last, last.rsplit(".", 1)[0]}
            if wanted in names:
                matches.setdefault(os.path.realpath(path), path)
    if len(matches) > 1:
        listed = ", ".join(map(str, matches.values()))
        raise ModelError(
            f"{name!r} is the name of {len(matches)} checkpoints: {listed}", advice="Give the path of one of them"
        )
    return next(iter(matches.values()), None)


def _download(repo: str, variant: str | None, unet: bool) -> Path:
    from huggingface_hub import snapshot_download

    parts = [*(NETWORK_PARTS if unet else ()), "vae", "text_encoder", "text_encoder_2"]
    names = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else ["*.safetensors"]
    weights = [f"{part}/{name}" for part in parts for name in names]
    patterns = ["model_index.json", SETTINGS, LABELS, "*/*.json", "*/merges.txt", *weights]
    try:
        cached = Path(snapshot_download(repo, local_files_only=True, allow_patterns=patterns))
        _check_parts(cached, parts)
        return cached
    except (OSError, ValueError, KeyError, ModelError):  # not in the local cache, or only some of its files
        pass
    try:
        fetched = Path(snapshot_download(repo, allow_patterns=patterns))
        _check_parts(fetched, parts)  # offline the client is content with what it has
        return fetched
    except Exception as error:  # the hub's client raises many kinds; all of them mean that the model is not here
        why = str(error) if isinstance(error, ModelError) else type(error).__name__
        raise ModelError(
            f"{repo} is not on this machine and could not be downloaded ({why})",
            advice="Connect to the internet, log in with `hf auth login` if it is gated, or give a diffusers folder or "
            "a .safetensors file",
        ) from error


def _check_parts(folder: Path, parts: Sequence[str]) -> None:
    """Raises ModelError, OSError, ValueError or KeyError for a folder that lacks the weights of a part it lists."""
    listed = read_json_object(folder / "model_index.json")
    for part in parts:
        if part in listed:
            weights_of(folder / part)
