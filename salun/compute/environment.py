"""Versions of what computes, and how much memory it took."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("salun", "torch", "diffusers", "transformers", "safetensors", "accelerate", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak allocation of the GPU, in bytes; None where there is no count."""
    host: int | None = None
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where what getrusage tells begins with the parent's peak
        peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.M)
        host = int(peak[1]) * 1024 if peak else None
    else:
        try:
            import resource  # not on Windows

            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        except ImportError:
            pass
    device: int | None = None
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.max_memory_allocated()
    return {"cpu_bytes": host, "device_bytes": device}
