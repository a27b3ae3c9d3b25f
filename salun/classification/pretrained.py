"""transformers' image classifiers as untrusted input: checked before the library builds or runs any part of them."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from salun.checkpoints import safetensors_io
from salun.checkpoints.diffusers_folder import check_links
from salun.checkpoints.pickled import check_torch
from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.sizes import check_size, first_line
from salun.errors import ModelError
from salun.untrusted import read_json_object
from salun.user_text import as_spelled

PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # a timm model's name that is neither a hub id nor a folder
LARGEST = 1_000_000  # of a config's integers
ATTENTION = (None, "eager", "sdpa")  # other names lead to a loader of kernels from the hub
FORBIDDEN = (  # lead to code, weights or kernels from elsewhere
    "auto_map", "backbone", "use_pretrained_backbone", "custom_pipelines", "quantization_config", "kernel_config",
    "use_kernels",
)  # fmt: skip
FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def load(name: str, allow_pickle: bool, **changes: Any) -> Any:
    """The classifier in a folder or of a hub id. changes: of its config. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForImageClassification

    folder = folder_of(name, allow_pickle)
    config = _object(folder / "config.json", name)
    safetensors = list(folder.glob("model*.safetensors"))
    pickles = list(folder.glob("pytorch_model*.bin"))
    if not safetensors and not pickles:
        raise ModelError(f"the image classifier {name!r} cannot be loaded: {folder} holds no model.safetensors")
    if not safetensors and not allow_pickle:
        raise ModelError(
            f"the image classifier {name!r} has its weights in {pickles[0].name}, a pickle, which may run code",
            advice="Use one with model.safetensors or, if you trust the file, {allow_pickle}",
        )
    if not safetensors:
        check_torch()
    try:
        check_config(config)
        made = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **changes)
    except Exception as error:  # the library raises many kinds for a config that it cannot use
        raise ModelError(f"the image classifier {name!r} cannot be loaded: {first_line(error)}") from error

    def build() -> Any:
        return AutoModelForImageClassification.from_config(made, trust_remote_code=False)

    check_size(build, _held(safetensors, pickles), folder / "config.json")
    try:
        model = AutoModelForImageClassification.from_pretrained(
            folder, config=made, trust_remote_code=False, local_files_only=True, use_safetensors=bool(safetensors),
            weights_only=True, ignore_mismatched_sizes=bool(changes),
        )  # fmt: skip
    except Exception as error:  # likewise for weights
        raise ModelError(f"the image classifier {name!r} cannot be loaded: {first_line(error)}") from error
    return model.float()


def _held(safetensors: list[Path], pickles: list[Path]) -> int:
    """Number of tensor entries in the weight files; for pickles, which are not opened for this, an upper bound."""
    if not safetensors:
        return sum(path.stat().st_size for path in pickles)
    headers = [safetensors_io.read_header(path) for path in safetensors]
    return sum(prod(entry.shape) for header in headers for entry in header.entries.values())


def folder_of(name: str, allow_pickle: bool) -> Path:
    """The model's folder, fetched from the hub if need be. Raises ModelError if it may not be opened."""
    folder = as_spelled(Path(name).expanduser())
    if not folder.is_dir():
        folder = _fetched(name, allow_pickle)
    check_links(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{name} holds an adapter (adapter_config.json) that names another model: remove it")
    return folder


def _fetched(name: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*FILES, *SAFETENSORS, *(PICKLES if allow_pickle else ())]
    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
        if (cached / "config.json").is_file() and any(cached.glob("*model*.*")):
            return cached
    except (OSError, ValueError):  # not in the local cache
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; each means that the model is not here
        raise ModelError(
            f"the image classifier {name!r} cannot be loaded: it is not a folder and could not be fetched "
            f"({type(error).__name__})"
        ) from error


def image_processor(name: str, allow_pickle: bool) -> dict[str, Any]:
    """The config of the model's image processor; empty if it has none. Raises ModelError if the file is damaged."""
    folder = folder_of(name, allow_pickle)
    if (folder / "preprocessor_config.json").is_file():
        return _object(folder / "preprocessor_config.json", name)
    if (folder / "processor_config.json").is_file():
        inner = _object(folder / "processor_config.json", name).get("image_processor")
        return inner if isinstance(inner, dict) else {}
    return {}


def _object(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise ModelError(f"the image classifier {name!r} cannot be loaded: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error


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
