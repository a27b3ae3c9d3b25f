"""A diffusers folder's parts: which files hold a part's weights, whether all are there, and tensors read by name.

A part (`unet`, `vae`, `text_encoder`, …) has its weights in one file or in shards with an index, and maybe several
times: as they are, and as a variant (`fp16`) whose name stands in the files' names. Parts need not agree in that.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from salun.checkpoints import safetensors_io
from salun.checkpoints.families.registry import NETWORK_PARTS
from salun.checkpoints.lazy_tensors import Stored
from salun.errors import ModelError
from salun.untrusted import read_json_object

STEM, TEXT_STEM = "diffusion_pytorch_model", "model"  # how diffusers and, for text encoders, transformers name files
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_READ = (".json", ".safetensors", ".bin", ".yaml")  # endings of the files that loading a model reads
_PARTS = (*NETWORK_PARTS, "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


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
    return TEXT_STEM if part.startswith("text_encoder") else STEM


def weights_of(part: Path) -> Weights:
    """The files to take a part's weights from: those of no variant, else `fp16`, else the first by name.

    part: the part's folder, such as `…/unet`. Raises ModelError without safetensors weights, or if an index names a
    shard that is missing or lies elsewhere.
    """
    stem, variants = stem_of(part.name), {}
    if not part.is_dir():
        raise ModelError(f"{part.parent} is incomplete: it has no folder {part.name}")
    for path in sorted(part.glob(f"{stem}*.safetensors")):
        middle = path.name[len(stem) : -len(".safetensors")]
        if (not middle or middle.startswith(".")) and not _SHARD.search(middle):
            variant = middle.removeprefix(".") or None
            variants[variant] = Weights((path,), variant)
    for path in sorted(part.glob(f"{stem}*.safetensors.index*.json")):
        variant = _variant_of_index(path.name, stem)
        if variant in variants:  # libraries disagree on which of them to take
            raise ModelError(
                f"{part} holds the same weights in one file and in shards ({path.name})", advice="Remove one of the two"
            )
        variants[variant] = Weights(_shards(path), variant, path)
    if not variants:
        raise ModelError(
            f"{part.parent} has no safetensors weights in {part}, and pickled weights are not read",
            advice="Convert them to safetensors",
        )
    return variants[min(variants, key=lambda name: (name is not None, name != "fp16", name or ""))]


def _variant_of_index(name: str, stem: str) -> str | None:
    """`stem.safetensors.index.json` and, of a variant, `stem.safetensors.index.fp16.json`."""
    middle = name.removeprefix(f"{stem}.").replace("safetensors.index", "").removesuffix("json").strip(".")
    return middle or None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        listed = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from error
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f"{index} cannot be read: it has no weight_map of tensors' and files' names")
    names = sorted(set(listed.values()))
    missing = next((n for n in names if "\0" in n or Path(n).name != n or not (index.parent / n).is_file()), None)
    if not names or missing is not None:
        shown = safetensors_io.truncated(missing) if missing is not None else "no file"
        raise ModelError(f"{index.parent} is incomplete: {index.name} lists {shown}, which is not there")
    return tuple(index.parent / name for name in names)


def open_component(part: Path) -> Stored:
    """The tensors of a part, such as the VAE, under the names that its files have. Raises ModelError."""
    headers = {file: safetensors_io.read_header(file) for file in weights_of(part).files}
    locations = {name: (file, name) for file, header in headers.items() for name in header.names}
    return Stored(part, locations, headers)


def check_tokenizer(folder: Path) -> None:
    """Raises ModelError for a folder without CLIP's vocabulary, of which the library makes an empty tokenizer."""
    there = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        raise ModelError(f"{folder} is incomplete: it has no tokenizer (vocab.json and merges.txt)")


def files_under(folder: Path) -> list[Path]:
    """Every readable file in a folder, those in linked folders too (each once: a link may lead back up)."""
    files, seen = [], set()
    for parent, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        files += [Path(parent, name) for name in names if os.path.isfile(os.path.join(parent, name))]
    return sorted(files)


def model_files(folder: Path) -> list[Path]:
    """Every file of a model's folder, without what `external_links` names."""
    return _walk(folder)[0]


def external_links(folder: Path) -> list[str]:
    """Links in a model's folder that lead out of it, as paths from it. They are neither followed nor copied.

    A foreign folder may hold links to the user's own files. A snapshot in the hub's cache has its files among its
    repository's `blobs`, which belong to it.
    """
    return [path.relative_to(folder).as_posix() for path in _walk(folder)[1]]


def check_links(folder: Path) -> None:
    """Raises ModelError if a file or part that a model needs is a link that leads out of the model's folder."""
    for name in external_links(folder):
        path = Path(name)
        if path.name in ("merges.txt", "labels.txt") or path.suffix in _READ or name in _PARTS:
            raise ModelError(
                f"{folder / name} is a link out of the model's folder and is not followed",
                advice="Copy the file or folder that it leads to into the model's folder",
            )


def _roots(folder: Path) -> list[Path]:
    home = Path(os.path.realpath(folder))
    repository = home.parent.parent
    cached = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return [home, repository / "blobs"] if cached else [home]


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of a model's folder, links that lead out of it), both sorted.

    Of linked folders only the first is entered, so that no chain of links leads round in circles.
    """
    files: list[Path] = []
    external: list[Path] = []
    roots, waiting = _roots(folder), [(folder, False)]
    while waiting:
        current, linked = waiting.pop()
        home = Path(os.path.realpath(current))
        try:
            names = os.listdir(current)
        except OSError:
            continue
        for name in names:
            path, real = current / name, Path(os.path.realpath(current / name))
            if not any(real.is_relative_to(root) for root in roots):
                external.append(path)
            elif path.is_file():
                files.append(path)
            elif path.is_dir():
                link = real != home / name
                if not link or not (linked or home.is_relative_to(real)):
                    waiting.append((path, linked or link))
    return sorted(files), sorted(external)
