"""Run by WebUI at each launch and by ComfyUI-Manager at install: says what is missing, and installs nothing.

A host's torch, numpy and transformers stay as they are.
"""

from __future__ import annotations

import importlib.util

NEEDED = ("torch", "numpy", "safetensors", "PIL", "yaml")


def missing() -> list[str]:
    """Modules the core needs that this Python does not have."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    lacking = missing()
    if lacking:
        print(f"salun: this Python has no {', '.join(lacking)}; the host should bring them. Nothing was installed.")
