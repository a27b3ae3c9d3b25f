"""The Python that jobs run in: the host's if its packages suffice, else an environment that Set up makes.

The environment also finds the host's packages, such as torch, through a .pth file. pip only adds packages that are
missing or too old, and does not change the host's. Each set-up makes a new folder, and the file `current`
names the one to use once it has been tried: the previous one is used until then, and if the set-up fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from salun.errors import ConfigError, SalunError
from salun.files import write_bytes

if TYPE_CHECKING:
    from .host import Host

LOWEST = {  # the lowest versions that an erasure was tested with, all at once (docs/webui.md)
    "torch": "2.1", "diffusers": "0.31", "transformers": "4.46", "huggingface_hub": "0.26", "accelerate": "0.31",
    "safetensors": "0.4.2", "numpy": "1.26", "pillow": "9.5", "pyyaml": "6.0", "filelock": "3.12", "jinja2": "3.1",
}  # fmt: skip
HELD = ("torch", "numpy")  # taken from the host, at its versions
PACKAGES = "diffusers==0.31.0", "transformers==4.46.3", "huggingface_hub>=0.26,<1", "accelerate>=0.31,<2"
SMALL = ("safetensors", "pillow", "pyyaml", "filelock", "jinja2")
MEGABYTES = 170
ASK = """
import json, sys
from importlib import metadata
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""
TRIAL = "import filelock, jinja2, yaml; from diffusers import AutoencoderKL, UNet2DConditionModel; " + (
    "from transformers import CLIPTextModel, CLIPTokenizer"
)
_running: set[Path] = set()  # folders whose set-up is running
_failed: dict[Path, str] = {}  # folder → why its last set-up failed
_lock = threading.Lock()


@dataclass(frozen=True)
class Missing:
    """A package that is missing or too old. installed: its version, None if it is missing."""

    name: str
    lowest: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.name} {self.lowest} ({f'has {self.installed}' if self.installed else 'missing'})"


def folder(host: Host) -> Path:
    """The folder of environments."""
    return host.data / "environment"


def _made(place: Path) -> Path | None:
    """The interpreter of the environment in use, if there is one."""
    try:
        name = (place / "current").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    python = _executable(place / name)
    return python if python.is_file() else None


@cache
def missing() -> tuple[Missing, ...]:
    """The packages that this interpreter lacks in a new process, which may find fewer than this process."""
    return _missing_in(sys.executable)


def _missing_in(python: str) -> tuple[Missing, ...]:
    versions = json.loads(_run([python, "-c", ASK, *LOWEST]))
    return tuple(
        Missing(name, lowest, versions.get(name))
        for name, lowest in LOWEST.items()
        if name not in versions or _numbers(versions[name]) < _numbers(lowest)
    )


def _listed(packages: tuple[Missing, ...]) -> str:
    return ", ".join(map(str, packages))


def _obstacle() -> str | None:
    """Why Set up cannot help, as a message; None if it can."""
    held = tuple(package for package in missing() if package.name in HELD)
    if not held:
        return None
    return f"Jobs need {_listed(held)}, which Set up takes from this program. Update the program first."


def python(host: Host) -> str:
    """The interpreter for jobs. Raises ConfigError if none has the packages."""
    if not missing():
        return sys.executable
    if (why := _obstacle()) is not None:
        raise ConfigError(why)
    made = _made(folder(host))
    if made is not None:
        return str(made)
    raise ConfigError(f"this program's Python lacks {_listed(missing())}", advice="Press Set up")


def state(host: Host) -> tuple[bool, str]:
    """Whether jobs can run, and a message."""
    place = folder(host)
    if not missing():
        return True, f"Ready: this program's Python ({sys.version.split()[0]}) has all packages that jobs need."
    if (why := _obstacle()) is not None:
        return False, why
    if place in _running:
        return False, f"Setting up {place}: this takes some minutes. Press Refresh the lists for its state."
    if place in _failed:
        return False, _failed[place]
    if _made(place) is not None:
        return True, f"Ready: jobs run in the environment {place}."
    return False, (
        f"This program's Python lacks {_listed(missing())}. Set up makes an environment for jobs at {place} "
        f"(about {MEGABYTES} MB, from the Python package index: {', '.join(PACKAGES)}), which uses this program's "
        "torch. The program's packages are not changed."
    )


def set_up(host: Host, wait: bool = False) -> str:
    """Make the environment, in the background unless `wait`. Returns a message.

    Raises ConfigError if Set up cannot help.
    """
    if not missing():
        return "There is nothing to set up."
    if (why := _obstacle()) is not None:
        raise ConfigError(why)
    place = folder(host)
    with _lock:
        if place in _running:
            return state(host)[1]
        _running.add(place)
        _failed.pop(place, None)
    thread = threading.Thread(target=_make, args=(place,), daemon=True)
    thread.start()
    if wait:
        thread.join()
    return state(host)[1]


def _make(place: Path) -> None:
    """Make a new environment in `place`; jobs use it if it works."""
    before = _made(place)
    new = place / time.strftime("%Y%m%d-%H%M%S")
    try:
        if place.is_dir():
            for old in place.iterdir():  # of failed or replaced set-ups, which no job uses
                if old.is_dir() and (before is None or old not in before.parents):
                    shutil.rmtree(old, ignore_errors=True)
        _install(new)
        write_bytes(place / "current", f"{new.name}\n".encode())
    except (OSError, RuntimeError, SalunError, metadata.PackageNotFoundError) as error:
        shutil.rmtree(new, ignore_errors=True)
        unchanged = "" if before is None else " The previous environment stays in use."
        _failed[place] = f"The set-up failed: {error}.{unchanged}"
    finally:
        _running.discard(place)


def _install(new: Path) -> None:
    """Make an environment with all packages that jobs need. Raises RuntimeError if that fails."""
    _run([sys.executable, "-m", "venv", str(new)])
    python = str(_executable(new))
    packages = _run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    sites = [p for p in sys.path if p.rstrip("/\\").endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({site!a})\n" for site in sites]  # with the .pth files in them
    (Path(packages) / "zz_salun_host.pth").write_text("".join(lines), encoding="ascii")
    constraints = new / "constraints.txt"
    constraints.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in HELD), encoding="utf-8")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraints)]
    _run([*pip, *PACKAGES, *(f"{name}>={LOWEST[name]}" for name in SMALL)])
    _run([python, "-c", TRIAL])
    if lacking := _missing_in(python):
        raise RuntimeError(f"packages are still missing after the installation: {_listed(lacking)}")


def _run(command: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}  # independent of the system's locale
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:500] if lines else f"{command[1:4]} ended with {done.returncode}")
    return done.stdout


def _executable(place: Path) -> Path:
    return place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
