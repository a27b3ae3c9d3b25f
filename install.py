"""Run by WebUI at each launch and by ComfyUI-Manager at install: says what is missing, and installs nothing.

A host's torch, numpy and transformers stay as they are.
"""

from __future__ import annotations

import importlib.util

# module → the package that brings it
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "psutil": "psutil",
    "filelock": "filelock",
}


def missing() -> list[str]:
    """Packages the core needs that this Python does not have."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


if __name__ == "__main__":
    lacking = missing()
    if lacking:
        print(
            f"salun: this Python has no {', '.join(lacking)}. Nothing was installed: the host brings them. "
            "Install the host's own requirements again, then restart it."
        )
