"""Names of outputs: which format a name asks for, and whether it may be written."""

from __future__ import annotations

import os
from pathlib import Path

from salun.errors import ConfigError
from salun.files import EXISTS

DELTA, LORA, DIFF = ".salun.safetensors", ".lora.safetensors", ".diff.safetensors"


def check_output(target: str, force: bool = False) -> None:
    """Raises ConfigError for an output that would overwrite something or whose name has no known format."""
    path = Path(target)
    there = os.path.lexists(path)  # a broken link too
    if not target.endswith((".safetensors", "/", os.sep)):
        raise ConfigError(
            f"is {target}, which names no known format",
            option="output",
            advice="End it in .safetensors (checkpoint), / (diffusers folder), .salun.safetensors (delta), "
            ".lora.safetensors or .diff.safetensors (for LoRA loaders)",
        )
    if there and not force:
        raise ConfigError(f"is {target}, which already exists", option="output", advice=EXISTS, code="exists")
    folder = target.endswith(("/", os.sep))
    if there and folder and not (path / "model_index.json").is_file():
        raise ConfigError(
            f"is {target}, which exists and is not a diffusers folder", option="output", advice="Choose another name"
        )
    if there and not folder and not path.is_file():
        raise ConfigError(f"is {target}, which exists and is not a file", option="output", advice="Choose another name")


def output_layout(target: str) -> str | None:
    """ "folder" or "file" of a whole model, None for a difference; by its name."""
    if target.endswith(("/", os.sep)):
        return "folder"
    return None if target.endswith((DELTA, LORA, DIFF)) else "file"
