"""What nodes keep on disk between runs: results, samples, and the state of an interrupted erasure."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from salun.errors import ConfigError, SalunError
from salun.masking.mask import Mask
from salun.masking.training_state import read_saved_history
from salun.runs.cache import DEFAULT_LIMIT, Cache, size_of
from salun.runs.folder import STATE, check_folder, exclusive_lock


def cache() -> Cache:
    """The nodes' cache, so that the same work is not done twice, even after a restart."""
    import folder_paths

    folder = os.environ.get("SALUN_CACHE") or Path(folder_paths.get_user_directory()) / "salun" / "cache"
    limit = size_of(os.environ.get("SALUN_CACHE_SIZE", str(DEFAULT_LIMIT)))
    return Cache(Path(folder).expanduser(), limit)


def state_folder(fingerprint: str, size: int) -> Path | None:
    """The folder of an erasure's mask and training state, to resume it after an interrupt.

    A valid state is resumed. States of other erasures are removed, for they are large.

    Args:
        fingerprint: That of the erasure's record.
        size: Bytes that a new state needs.

    Returns:
        None without a cache, without disk space, or while another ComfyUI runs the same erasure.
    """
    store = cache()
    if not store.limit:
        return None
    root = store.folder / "unfinished"
    folder = root / fingerprint
    resumable = folder.is_dir() and _is_valid(folder, fingerprint)
    for other in root.iterdir() if root.is_dir() else ():
        if other == folder and resumable:
            continue
        with suppress(ConfigError):  # in use by another ComfyUI
            with exclusive_lock(other):
                shutil.rmtree(other / STATE, ignore_errors=True)
            shutil.rmtree(other, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not resumable and shutil.disk_usage(root).free <= size:
            return None
        with exclusive_lock(folder):
            return folder
    except (OSError, ConfigError):
        return None


def _is_valid(folder: Path, fingerprint: str) -> bool:
    try:
        check_folder(folder, resume=True)
        read_saved_history(folder / STATE / "training.safetensors", fingerprint)
        mask = folder / STATE / "mask.safetensors"
        return not mask.exists() or Mask.load(mask).total > 0
    except SalunError:
        return False
