"""The record of a run: `run.json`, written atomically from the start on, timings, peak memory, files with hashes."""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from salun.errors import Cancelled, ConfigError
from salun.formats.tensorfile import sha256_file, write_bytes

SCHEMA = 1
PACKAGES = ("salun", "torch", "diffusers", "transformers", "safetensors", "accelerate", "numpy", "pillow")
logger = logging.getLogger("salun")


class RunRecord:
    """Collects what a run did; kept in `folder/run.json` where a folder is given, in memory otherwise.

    status: running → done | failed | cancelled.
    """

    def __init__(self, folder: Path | None, command: str, options: Mapping[str, Any], seed: int, device: str) -> None:
        self.folder = folder
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "command": command,
            "options": dict(options),
            "device": device,
            "concepts": [],
            "notes": [],
            "seed": seed,
            "versions": versions(),
            "inputs": [],
            "outputs": [],
            "timings": {},
            "peak_memory": {"host_bytes": None, "device_bytes": None},
            "mask": None,
            "losses": [],
            "metrics": {},
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the run is on; at the end its status, log and peak memory are written, whatever happened."""
        handler: logging.Handler | None = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
        self.write()
        try:
            yield
            self.data["status"] = "done"
        except BaseException as error:
            stopped = isinstance(error, Cancelled | KeyboardInterrupt)
            self.data["status"] = "cancelled" if stopped else "failed"
            self.data["error"] = str(error) or type(error).__name__
            logger.log(logging.INFO if stopped else logging.ERROR, "%s: %s", self.data["status"], self.data["error"])
            raise
        finally:
            self.data["peak_memory"] = peak_memory()
            self.write()
            if handler is not None:
                logger.removeHandler(handler)
                handler.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the same name adds up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            timings = self.data["timings"]
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - began, 3)
            logger.info("%s: %.1f s", name, timings[name])
            self.write()

    def note_file(self, side: str, kind: str, path: Path, shown: str) -> None:
        """Add a file to `inputs` or `outputs`, with size and sha256; `shown` is its path as told (never absolute)."""
        self.data[side].append({"kind": kind, "path": shown, "bytes": path.stat().st_size, "sha256": sha256_file(path)})

    def write(self) -> None:
        """Write `run.json`, whole or not at all."""
        if self.folder is not None:
            text = json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"
            write_bytes(self.folder / "run.json", text.encode("utf-8"))


def new_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """`runs/<time>-<name>`, with a name that every system allows, not there yet."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "run"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}"
    folder, count = root / stem, 1
    while folder.exists():
        count += 1
        folder = root / f"{stem}-{count}"
    return folder


def require_new(folder: Path) -> None:
    """Raises ConfigError if a run folder holds a run already."""
    if (folder / "run.json").exists():
        raise ConfigError(f"--run-dir {folder} holds a run already: name another folder")


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
    try:
        import resource  # not on Windows

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        pass
    device: int | None = None
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.max_memory_allocated()
    return {"host_bytes": host, "device_bytes": device}
