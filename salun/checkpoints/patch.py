"""A copy of a model with some of its network's tensors changed and everything else byte-identical; atomic."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from salun.checkpoints import diffusers_folder, keymap, safetensors_io
from salun.checkpoints.diffusers_folder import model_files, weights_of
from salun.checkpoints.lazy_tensors import Stored, renamed
from salun.errors import ModelError
from salun.files import new_folder

PARTS = ("vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder")  # what else has weights
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".onnx_data", ".pb", ".msgpack", ".h5", ".gguf")


def write_patched(
    stored: Stored, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str], keep_ema: bool = False
) -> None:
    """Write a copy of the model in its own layout. changed: diffusers name → tensor, of the file's dtype and shape.

    Other copies of the weights are excluded (see `excluded_weights`). Raises ModelError if the source has changed since
    it was opened, a tensor does not fit, or the disk has no room; nothing is left at `target` then.
    """
    if stored.single:
        replaced = _changed_in(stored, stored.path, changed)
        dropped = [] if keep_ema else excluded_weights(stored)
        safetensors_io.rewrite(
            stored.path, target, replaced, metadata, dropped=dropped, stamp=stored.headers[stored.path].stamp
        )
    else:
        _write_folder(stored, target, changed, metadata)


def _changed_in(stored: Stored, file: Path, changed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The changed tensors of one file, by their names in it."""
    return renamed(changed, {stored.name_in_file(name): name for name in changed if stored.locations[name][0] == file})


def excluded_weights(stored: Stored) -> list[str]:
    """Other copies of the network's weights, which still contain the concept and are therefore not copied.

    For a single file: the names of its EMA tensors. For a folder: other variants of its UNet, single-file checkpoints
    and other files with a UNet, as relative paths.
    """
    if stored.single:
        return [name for name in stored.headers[stored.path].names if name.startswith(keymap.EMA)]
    index = weights_of(stored.path / stored.part).index
    retained = {os.path.realpath(file) for file in (*stored.files, *([index] if index else []))}
    return [
        path.relative_to(stored.path).as_posix()
        for path in model_files(stored.path)
        if os.path.realpath(path) not in retained
        and _is_other_copy(path, path.relative_to(stored.path).parts[:-1], stored.part)
    ]


def _is_other_copy(path: Path, inside: tuple[str, ...], part: str) -> bool:
    """Whether a file in a model's folder may hold weights of the network `part`. inside: its parent folders."""
    if inside[:1] == (part,):
        return path.suffix in WEIGHTS or (".index." in path.name and path.suffix == ".json")
    if path.suffix not in WEIGHTS or (inside[:1] and inside[0] in PARTS):
        return False
    if path.suffix != ".safetensors" or not inside:
        return True
    try:
        names = safetensors_io.read_header(path).names
    except ModelError:
        return True
    return any(name.startswith((keymap.UNET, "down_blocks.", "input_blocks.", "transformer_blocks.")) for name in names)


def external_links(stored: Stored) -> list[str]:
    """Links in a model's folder that are not copied, as relative paths; none for a single file."""
    return [] if stored.single else diffusers_folder.external_links(stored.path)


def size_of(stored: Stored) -> int:
    """Bytes of the whole model on disk."""
    if stored.single:
        return stored.path.stat().st_size
    return sum(path.stat().st_size for path in model_files(stored.path))


def _write_folder(stored: Stored, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    unwanted = {stored.path / name for name in excluded_weights(stored)}
    replaced = {os.path.realpath(file): file for file in stored.files}
    with new_folder(target) as temporary:
        for source in (path for path in model_files(stored.path) if path not in unwanted):
            copy = temporary / source.relative_to(stored.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            weight_file = replaced.get(os.path.realpath(source))
            if weight_file is not None:
                safetensors_io.rewrite(
                    source,
                    copy,
                    _changed_in(stored, weight_file, changed),
                    metadata,
                    stamp=stored.headers[weight_file].stamp,
                )
            else:
                shutil.copyfile(source, copy)
