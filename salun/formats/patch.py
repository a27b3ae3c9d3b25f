"""A copy of a model with some of its UNet's tensors changed: all else byte for byte, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from salun.errors import ModelError
from salun.formats import keymap, tensorfile
from salun.formats.folder import weights_of
from salun.formats.stored import Stored
from salun.formats.tensorfile import of_the_dead, remove_leftovers

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".onnx_data", ".pb", ".msgpack", ".h5", ".gguf")


def write_patched(
    stored: Stored, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str], keep_ema: bool = False
) -> None:
    """Write a copy of the model in its own layout. changed: diffusers name → tensor, of the file's dtype and shape.

    Other copies of the weights are left out (see `left_out`). Raises ModelError if the source has changed since it was
    opened, a tensor does not fit, or the disk has no room; nothing is left at `target` then.
    """
    if stored.single:
        replaced = _Inner(stored, stored.path, changed)
        dropped = [] if keep_ema else left_out(stored)
        tensorfile.rewrite(
            stored.path, target, replaced, metadata, dropped=dropped, stamp=stored.headers[stored.path].stamp
        )
    else:
        _write_folder(stored, target, changed, metadata)


class _Inner(Mapping[str, Tensor]):
    """Changed tensors of one file by their names in it, each made when it is asked for."""

    def __init__(self, stored: Stored, file: Path, changed: Mapping[str, Tensor]) -> None:
        self._changed = changed
        self._names = {stored.inner(name): name for name in changed if stored.places[name][0] == file}

    def __getitem__(self, inner: str) -> Tensor:
        return self._changed[self._names[inner]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def left_out(stored: Stored) -> list[str]:
    """What a copy must not have, since it still holds the concept: other copies of the UNet's weights.

    Of a single file the names of its EMA tensors; of a folder its other variants and whole checkpoints at its top, as
    paths from it.
    """
    if stored.single:
        return [name for name in stored.headers[stored.path].names if name.startswith(keymap.EMA)]
    index = weights_of(stored.path / "unet").index
    kept = {file.resolve() for file in (*stored.files, *([index] if index else []))}
    candidates = [p for place in (stored.path, stored.path / "unet") for p in place.iterdir() if p.is_file()]
    return [
        p.relative_to(stored.path).as_posix()
        for p in sorted(candidates)
        if p.resolve() not in kept and (p.suffix in WEIGHTS or (".index." in p.name and p.suffix == ".json"))
    ]


def size_of(stored: Stored) -> int:
    """Bytes of the whole model on disk."""
    if stored.single:
        return stored.path.stat().st_size
    return sum(path.stat().st_size for path in _files(stored.path))


def _write_folder(stored: Stored, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    unwanted = {stored.path / name for name in left_out(stored)}
    replaced = {file.resolve(): file for file in stored.files}
    with new_folder(target) as temporary:
        for source in (path for path in _files(stored.path) if path not in unwanted):
            copy = temporary / source.relative_to(stored.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            own = replaced.get(source.resolve())
            if own is not None:
                tensorfile.rewrite(
                    source, copy, _Inner(stored, own, changed), metadata, stamp=stored.headers[own].stamp
                )
            else:
                shutil.copyfile(source, copy)


def _files(folder: Path) -> list[Path]:
    """Every file in a folder, those in linked folders too (each once: a link may lead back up)."""
    found, seen = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if Path(place, name).is_file()]
    return sorted(found)


def tidy(target: Path) -> None:
    """Clear away what killed processes left beside `target`; a folder that one had moved aside is put back."""
    remove_leftovers(target)
    for moved in of_the_dead(target, ".old"):  # killed before its last rename, or after it
        if os.path.lexists(target):
            _remove(moved)
        else:
            os.replace(moved, target)


def _remove(place: Path) -> None:
    """A folder, or the link to one."""
    if place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets its name only when it is whole; what had the name is moved aside until then.

    What a killed process had moved aside is put back first. Raises ModelError if it cannot be written; nothing is left
    then, and what was there is there.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        tidy(target)
        yield temporary
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except OSError:
            if aside.exists():
                os.replace(aside, target)
            raise
        _remove(aside)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}): make room or write elsewhere"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
