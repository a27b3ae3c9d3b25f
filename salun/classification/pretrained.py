"""transformers' image classifiers, from a folder or the hub."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from salun.checkpoints import transformers_folder
from salun.checkpoints.transformers_folder import ModelFiles, load_model, processor_config

FILES = ModelFiles("image classifier")


def load(name: str, allow_pickle: bool, **changes: Any) -> Any:
    """The classifier in a folder or of a hub id. changes: of its config. Raises ModelError."""
    from transformers import AutoModelForImageClassification

    files = replace(FILES, pickles=allow_pickle)
    build = partial(AutoModelForImageClassification.from_config, trust_remote_code=False)
    return load_model(name, folder_of(name, allow_pickle), files, AutoModelForImageClassification, build, **changes)


def folder_of(name: str, allow_pickle: bool) -> Path:
    """The model's folder, fetched from the hub if need be. Raises ModelError if it may not be opened."""
    return transformers_folder.folder_of(name, replace(FILES, pickles=allow_pickle))


def image_processor(name: str, allow_pickle: bool) -> dict[str, Any]:
    """The config of the model's image processor; empty if it has none. Raises ModelError if the file is damaged."""
    return processor_config(folder_of(name, allow_pickle), name, FILES)
