"""Names of outputs: which format a name asks for, and whether it may be written."""

from __future__ import annotations

import os
from pathlib import Path

from salun.errors import ConfigError

DELTA, LORA, DIFF = ".salun.safetensors", ".lora.safetensors", ".diff.safetensors"


def check_output(target: str, force: bool = False) -> None:
    """Raises ConfigError for an output that would overwrite something or whose format is not known."""
    path = Path(target)
    there = os.path.lexists(path)  # a link that leads nowhere is something too
    if not target.endswith((".safetensors", "/", os.sep)):
        raise ConfigError(
            f"--output {target}: end it in .safetensors (checkpoint), / (diffusers folder), .salun.safetensors "
            "(delta), .lora.safetensors or .diff.safetensors (for stock loaders)"
        )
    if there and not force:
        raise ConfigError(f"--output {target} is there already: choose another name, or add --force", code="exists")
    folder = target.endswith(("/", os.sep))
    if there and folder and not (path / "model_index.json").is_file():
        raise ConfigError(f"--output {target} is there already and is no diffusers folder: it is not replaced")
    if there and not folder and not path.is_file():
        raise ConfigError(f"--output {target} is there already and is no file: choose another name")


def output_layout(target: str) -> str | None:
    """ "folder" or "file" of a whole model, None for a difference; by its name."""
    if target.endswith(("/", os.sep)):
        return "folder"
    return None if target.endswith((DELTA, LORA, DIFF)) else "file"
