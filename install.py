"""Run by a WebUI at launch and by ComfyUI-Manager at install: reports missing packages and installs nothing.

The host's torch, numpy and transformers stay as they are.
"""

from __future__ import annotations

import importlib.util

# module → the package that contains it
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
    names = missing()
    if names:
        print(
            f"salun: this Python has no {', '.join(names)}. Nothing was installed, since the host provides them. "
            "Install the host's own requirements again, then restart it."
        )
