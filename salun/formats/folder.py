"""A diffusers folder's parts: which files hold a part's weights, whether all are there, and tensors read by name.

A part (`unet`, `vae`, `text_encoder`, …) has its weights in one file or in shards with an index, and maybe several
times: as they are, and as a variant (`fp16`) whose name stands in the files' names. Parts need not agree in that.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from salun.errors import ModelError
from salun.formats import tensorfile
from salun.formats.stored import Stored

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
TEXT_STEM = "model"  # of text encoders, which transformers writes
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Weights:
    """The files of one part that hold its weights, in order; variant: the word in their names, None if there is none.

    index: names the shards, where there are several.
    """

    files: tuple[Path, ...]
    variant: str | None
    index: Path | None = None


def stem_of(part: str) -> str:
    """How the names of a part's weight files begin."""
    return STEMS.get(part, TEXT_STEM)


def weights_of(part: Path) -> Weights:
    """The files to take a part's weights from: those of no variant, else `fp16`, else the first by name.

    part: the part's folder, such as `…/unet`. Raises ModelError if there are none in safetensors, or an index names a
    shard that is missing or lies elsewhere.
    """
    stem, found = stem_of(part.name), {}
    if not part.is_dir():
        raise ModelError(f"{part.parent} has no folder {part.name}: the model is not whole")
    for path in sorted(part.glob(f"{stem}*.safetensors")):
        middle = path.name[len(stem) : -len(".safetensors")]
        if (not middle or middle.startswith(".")) and not _SHARD.search(middle):
            variant = middle.removeprefix(".") or None
            found[variant] = Weights((path,), variant)
    for path in sorted(part.glob(f"{stem}*.safetensors.index*.json")):
        variant = _variant_of_index(path.name, stem)
        if variant in found:  # libraries disagree on which of them to take
            raise ModelError(f"{part} holds the same weights whole and in shards ({path.name}): remove one of the two")
        found[variant] = Weights(_shards(path), variant, path)
    if not found:
        raise ModelError(
            f"{part.parent} has no safetensors weights in {part}: pickled weights are not read; convert them first"
        )
    return found[min(found, key=lambda name: (name is not None, name != "fp16", name or ""))]


def _variant_of_index(name: str, stem: str) -> str | None:
    """`stem.safetensors.index.json` and, of a variant, `stem.safetensors.index.fp16.json`."""
    middle = name.removeprefix(f"{stem}.").replace("safetensors.index", "").removesuffix("json").strip(".")
    return middle or None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from error
    missing = next((n for n in names if Path(str(n)).name != n or not (index.parent / n).is_file()), None)
    if not names or missing is not None:
        raise ModelError(f"{index} names {missing or 'no file'}, which is not beside it: the model is not whole")
    return tuple(index.parent / name for name in names)


def open_part(part: Path) -> Stored:
    """A part's tensors under the names that its files have, each read when it is asked for. Raises ModelError."""
    headers = {file: tensorfile.read_header(file) for file in weights_of(part).files}
    places = {name: (file, name) for file, header in headers.items() for name in header.names}
    return Stored(part, places, headers)


def check_tokenizer(folder: Path) -> None:
    """Raises ModelError for a folder without CLIP's words. (The library makes an empty tokenizer of it.)"""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        raise ModelError(f"{folder} holds no tokenizer (vocab.json and merges.txt): the model is not whole")


def files_under(folder: Path) -> list[Path]:
    """Every readable file in a folder, those in linked folders too (each once: a link may lead back up)."""
    found, seen = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if os.path.isfile(os.path.join(place, name))]
    return sorted(found)
