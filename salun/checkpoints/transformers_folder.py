"""Folders of transformers models as untrusted input: checked before the library builds or runs any part of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from salun.checkpoints import safetensors_io
from salun.checkpoints.diffusers_folder import check_links
from salun.checkpoints.hub import PATIENCE, silent_client
from salun.checkpoints.pickled import check_torch
from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.sizes import check_size, first_line
from salun.errors import ModelError
from salun.untrusted import JSON_BYTES, read_json, read_json_object, read_text
from salun.user_text import as_spelled

PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # a timm model's name that is neither a hub id nor a folder
LARGEST, SIDE = 1_000_000, 4096  # of a config's integers; of an image's sides in pixels
ATTENTION = (None, "eager", "sdpa")  # other names lead to a loader of kernels from the hub
FORBIDDEN = (  # lead to code, weights or kernels from elsewhere
    "auto_map", "backbone", "use_pretrained_backbone", "custom_pipelines", "quantization_config", "kernel_config",
    "use_kernels",
)  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
OFFLINE = "Connect to the internet, or give a folder with its files"


@dataclass(frozen=True)
class ModelFiles:
    """Which files of a repository make up a model of a kind.

    Args:
        title: The kind, in messages: "image classifier".
        others: Patterns of the files other than weights.
        needed: Those of the other files without which a copy in the local cache is not complete.
        part: The folder in the repository that holds the config and the weights; "" for the repository itself.
        pickles: Whether weights may be a pickle.
    """

    title: str
    others: Sequence[str] = PROCESSORS
    needed: Sequence[str] = ()
    part: str = ""
    pickles: bool = False

    @property
    def patterns(self) -> list[str]:
        """Of all files."""
        inner = ["config.json", *SAFETENSORS, *(PICKLES if self.pickles else ())]
        return [*(f"{self.part}/{name}" if self.part else name for name in inner), *self.others]

    def lacking(self, name: str, why: str) -> str:
        """A message that a model of this name cannot be loaded."""
        return f"the {self.title} {name!r} cannot be loaded: {why}"


def local_folder(name: str) -> Path | None:
    """The folder that a name is; None for a hub id."""
    folder = as_spelled(Path(name).expanduser())
    return folder if folder.is_dir() else None


def folder_of(name: str, files: ModelFiles, revision: str | None = None) -> Path:
    """The model's folder, fetched from the hub if it is not in the local cache.

    Args:
        name: A folder or hub id; the latter may have a revision, as in ID@REVISION.
        revision: Of a hub id that has none; None for the newest.

    Raises:
        ModelError: It cannot be fetched, or may not be opened.
    """
    repo, _, named = name.partition("@")
    folder = local_folder(name) or _fetched(repo, files, named or revision)
    check_links(folder)
    if (folder / files.part / "adapter_config.json").exists():
        raise ModelError(f"{name} holds an adapter (adapter_config.json) that names another model: remove it")
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the cache of the hub, which is named by it; None for another folder."""
    is_commit = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) is not None
    return folder.name if is_commit else None


def _fetched(name: str, files: ModelFiles, revision: str | None) -> Path:
    from huggingface_hub import model_info, snapshot_download

    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=files.patterns))
        inner, needed = cached / files.part, [cached / each for each in files.needed]
        if all(path.is_file() for path in (inner / "config.json", *needed)) and any(inner.glob("*model*.*")):
            return cached
    except (OSError, ValueError):  # not in the local cache
        pass
    try:
        with silent_client():
            model_info(name, revision=revision, timeout=PATIENCE)  # one attempt: the download's own take half a minute
            return Path(snapshot_download(name, revision=revision, allow_patterns=files.patterns))
    except Exception as error:  # the hub's client raises many kinds; each means that the model is not here
        why = f"it is not a folder and could not be fetched ({type(error).__name__})"
        raise ModelError(files.lacking(name, why), advice=OFFLINE) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a model's weights, sorted; without any its pickles."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def load_model(
    name: str, folder: Path, files: ModelFiles, kind: Any, build: Callable[[Any], Any], **changes: Any
) -> Any:
    """The model in a folder, in eval mode and float32.

    Args:
        name: As the user gave it.
        kind: A class of transformers, with `from_pretrained`.
        build: Builds such a model from a config.
        changes: Of its config; the weights of parts that they change are new.

    Raises:
        ModelError: The folder has no weights that may be read, they are not those of its config, or that is invalid.
    """
    from transformers import AutoConfig

    config, weights = read_config(folder / "config.json", name, files), readable_weights(name, folder, files)
    pickled = weights[0].suffix != ".safetensors"
    try:
        check_config(config)
        made = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **changes)
    except Exception as error:  # the library raises many kinds for a config that it cannot use
        raise ModelError(files.lacking(name, first_line(error))) from error
    check_size(lambda: build(made), entries_of(weights), folder / "config.json")
    try:
        model, info = kind.from_pretrained(
            folder, config=made, trust_remote_code=False, local_files_only=True, use_safetensors=not pickled,
            weights_only=True, ignore_mismatched_sizes=bool(changes), output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # likewise for weights
        raise ModelError(files.lacking(name, first_line(error))) from error
    missing = sorted(info["missing_keys"])
    if missing and not changes:
        raise ModelError(files.lacking(name, f"its weight files lack {truncated(missing[0])} (of {len(missing)})"))
    return model.float().eval()


def readable_weights(name: str, folder: Path, files: ModelFiles) -> list[Path]:
    """The files with a model's weights, see `weight_files`. Raises ModelError if none of them may be read."""
    weights = weight_files(folder)
    if not weights:
        raise ModelError(files.lacking(name, f"{folder} holds no model.safetensors"))
    if weights[0].suffix == ".safetensors":
        return weights
    if not files.pickles:
        raise ModelError(
            f"the {files.title} {name!r} has its weights in {weights[0].name}, a pickle, which may run code",
            advice="Use one with model.safetensors or, if you trust the file, {allow_pickle}",
        )
    check_torch()
    return weights


def entries_of(weights: list[Path]) -> int:
    """Number of tensor entries in the weight files; for pickles, which are not opened for this, an upper bound."""
    if weights[0].suffix != ".safetensors":
        return sum(path.stat().st_size for path in weights)
    headers = [safetensors_io.read_header(path) for path in weights]
    return sum(prod(entry.shape) for header in headers for entry in header.entries.values())


def read_config(path: Path, name: str, files: ModelFiles) -> dict[str, Any]:
    """The object in a config of the model. Raises ModelError."""
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise ModelError(files.lacking(name, f"it has no {path.name}")) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error


def processor_config(folder: Path, name: str, files: ModelFiles) -> dict[str, Any]:
    """The config of the image processor in a folder; empty if it has none. Raises ModelError."""
    if (folder / PROCESSORS[0]).is_file():
        return read_config(folder / PROCESSORS[0], name, files)
    if (folder / PROCESSORS[1]).is_file():
        inner = read_config(folder / PROCESSORS[1], name, files).get("image_processor")
        return inner if isinstance(inner, dict) else {}
    return {}


def image_processor(folder: Path, name: str, files: ModelFiles) -> Any:
    """transformers' image processor of a folder, which gives the same pixels with torchvision and without.

    Raises:
        ModelError: It has none, or one that is invalid or not among the library's.
    """
    from transformers import AutoImageProcessor

    config = processor_config(folder, name, files)
    newer = find_spec("transformers.image_processing_backends") is not None
    choice = {"backend": "pil"} if newer else {"use_fast": False}
    try:
        if not config:
            raise ValueError(f"it has no {PROCESSORS[0]}")
        check_config(config)
        for key, side in _sides(config):
            if not isinstance(side, int) or not 1 <= side <= SIDE:
                raise ValueError(f"the {key} of its image processor is {truncated(repr(side))}, not 1 to {SIDE}")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **choice)
    except Exception as error:  # the library raises many kinds for a config that it cannot use
        raise ModelError(files.lacking(name, first_line(error))) from error


def clip_tokenizer(folder: Path, name: str, files: ModelFiles) -> Any:
    """CLIP's tokenizer in a folder, its files bounded. Raises ModelError."""
    from transformers import CLIPTokenizer

    try:
        for path in (folder / each for each in TOKENIZER if (folder / each).is_file()):
            read_json(path) if path.suffix == ".json" else read_text(path, JSON_BYTES)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the Rust library do not derive from Exception
        raise ModelError(files.lacking(name, f"its tokenizer cannot be read ({first_line(error)})")) from error


def _sides(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("size", "crop_size"):
        value = config.get(key)
        yield from (
            (key, side) for side in (value.values() if isinstance(value, dict) else [value]) if value is not None
        )


def check_config(node: Any) -> None:
    """Raises ValueError for a config that would fetch or open files, run code, or holds a number out of range."""
    if isinstance(node, list):
        for value in node:
            check_config(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if "attn_implementation" in key or "experts_implementation" in key:
                allowed = all(part in ATTENTION for part in (value.values() if isinstance(value, dict) else [value]))
            elif key == "architecture":
                allowed = value is None or (isinstance(value, str) and re.fullmatch(PLAIN, value) is not None)
            elif key == "model_args":  # of timm's own function, which opens files by such names
                allowed = not value or (isinstance(value, dict) and not any(map(_is_text, value.values())))
            else:
                allowed = not value or key not in FORBIDDEN
            if not allowed:
                raise ValueError(f"its {truncated(key)} is {truncated(repr(value))}, which is not allowed in a file")
            check_config(value)
    elif isinstance(node, int) and abs(node) > LARGEST:
        raise ValueError(f"it holds the number {node}; the limit is {LARGEST:,}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str | dict)
