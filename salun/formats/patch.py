"""A copy of a model with some of its UNet's tensors changed: all else byte for byte, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from salun.errors import ConfigError, ModelError
from salun.formats import keymap, tensorfile
from salun.formats.atomic import _remove, aside_of, moved_aside, remove_leftovers, temporary_folder
from salun.formats.folder import links_out, model_files, weights_of
from salun.formats.stored import Stored
from salun.formats.tensorfile import sha256_file

PARTS = ("vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder")  # what else has weights
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

    Of a single file the names of its EMA tensors; of a folder its UNet's other variants, whole checkpoints, and what
    else holds a UNet, as paths from it.
    """
    if stored.single:
        return [name for name in stored.headers[stored.path].names if name.startswith(keymap.EMA)]
    index = weights_of(stored.path / "unet").index
    kept = {os.path.realpath(file) for file in (*stored.files, *([index] if index else []))}
    return [
        path.relative_to(stored.path).as_posix()
        for path in model_files(stored.path)
        if os.path.realpath(path) not in kept and _is_other_copy(path, path.relative_to(stored.path).parts[:-1])
    ]


def _is_other_copy(path: Path, inside: tuple[str, ...]) -> bool:
    """Whether a file of a folder, `inside` these of its folders, holds a UNet's weights, or may."""
    if inside[:1] == ("unet",):
        return path.suffix in WEIGHTS or (".index." in path.name and path.suffix == ".json")
    if path.suffix not in WEIGHTS or (inside[:1] and inside[0] in PARTS):
        return False
    if path.suffix != ".safetensors" or not inside:
        return True
    try:
        names = tensorfile.read_header(path).names
    except ModelError:
        return True
    return any(name.startswith((keymap.UNET, "down_blocks.", "input_blocks.")) for name in names)


def led_out(stored: Stored) -> list[str]:
    """Links of a model's folder, as paths from it, that a copy must not carry along; none of a single file."""
    return [] if stored.single else links_out(stored.path)


def size_of(stored: Stored) -> int:
    """Bytes of the whole model on disk."""
    if stored.single:
        return stored.path.stat().st_size
    return sum(path.stat().st_size for path in model_files(stored.path))


def _write_folder(stored: Stored, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    unwanted = {stored.path / name for name in left_out(stored)}
    replaced = {os.path.realpath(file): file for file in stored.files}
    with new_folder(target) as temporary:
        for source in (path for path in model_files(stored.path) if path not in unwanted):
            copy = temporary / source.relative_to(stored.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            own = replaced.get(os.path.realpath(source))
            if own is not None:
                tensorfile.rewrite(
                    source, copy, _Inner(stored, own, changed), metadata, stamp=stored.headers[own].stamp
                )
            else:
                shutil.copyfile(source, copy)


def tidy(target: Path) -> None:
    """Clear away what killed processes left beside `target`; a folder that one had moved aside is put back."""
    remove_leftovers(target)
    for moved in moved_aside(target):  # killed before its last rename, or after it
        if os.path.lexists(target):
            _remove(moved)
        else:
            os.replace(moved, target)


@contextmanager
def placed(target: Path, force: bool = False, again: bool = False) -> Iterator[Path]:
    """Where to write what is to be `target`: without `force` it gets that name only if nothing has it by then.

    (The work takes long enough for something to appear there meanwhile.) again: the very same bytes may be there, of a
    run that stopped after writing them. Raises ConfigError if something else is, and leaves that as it is.
    """
    if force:
        yield target
        return
    tidy(target)
    try:
        with temporary_folder(target) as beside:
            yield beside / target.name
            if not (again and target.exists() and _contents(beside / target.name) == _contents(target)):
                _place(beside / target.name, target)
    except FileExistsError as error:
        raise ConfigError(f"{target} is there already: choose another name, or add --force") from error
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error


def _contents(path: Path) -> dict[str, str]:
    """sha256 of a file, or of each in a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def _place(made: Path, target: Path) -> None:
    """Give a file or folder its name. Raises FileExistsError if something has it."""
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
    """A folder that gets its name only when it is whole; what had the name is moved aside until then.

    What a killed process had moved aside is put back first. Raises ModelError if it cannot be written; nothing is left
    then, and what was there is there.
    """
    target = target.absolute()
    try:
        tidy(target)
        with temporary_folder(target) as temporary:
            yield temporary
            _sync(temporary)
            _swap(temporary, target)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}): make room or write elsewhere"
        ) from error


def _swap(temporary: Path, target: Path) -> None:
    """Give a folder its name; what had the name is moved aside, and removed at the end."""
    aside = aside_of(temporary)
    if os.path.lexists(target):
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:  # an interrupt too: what was there is there again
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
