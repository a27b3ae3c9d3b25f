"""Versions of packages, peak memory, and what a container leaves of memory."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("salun", "torch", "diffusers", "transformers", "safetensors", "accelerate", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that affect results."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak allocation of the GPU, in bytes; None where unknown."""
    cpu: int | None = None
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage includes the peak of the parent process
        peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.M)
        cpu = int(peak[1]) * 1024 if peak else None
    else:
        try:
            import resource  # not on Windows

            cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        except ImportError:
            pass
    device: int | None = None
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.max_memory_allocated()
    return {"cpu_bytes": cpu, "device_bytes": device}


def free_in_container(groups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the control group of this process may yet take; empty where no limit is known.

    Args:
        groups: Where the kernel shows control groups, of version 2 or 1.
    """
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (int((groups / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = (groups / limit).with_name("memory.stat").read_text(encoding="ascii", errors="replace")
        except (OSError, ValueError):  # no such version, or "max"
            continue
        cached = re.search(rf"^{files} (\d+)", stat, re.M)  # what the kernel frees when memory is short
        return [max(0, most - now + (int(cached[1]) if cached else 0))]
    return []
