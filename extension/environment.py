"""Which Python the jobs run in: the program's own where its packages suffice, else an environment of ours beside it.

The environment sees the program's packages (torch above all) through a .pth file, after its own: so pip adds only what
is missing or too old, and nothing of the program's is touched. Each set-up makes a folder of its own, and the file
`current` names the one to use once it has been tried: what worked before works until then, and if it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from salun.errors import ConfigError, SalunError
from salun.files import write_bytes

if TYPE_CHECKING:
    from .host import Host

LOWEST = {  # the lowest that a whole erasure was seen with, all of them at once (docs/webui.md)
    "torch": "2.1", "diffusers": "0.31", "transformers": "4.46", "huggingface_hub": "0.26", "accelerate": "0.31",
    "safetensors": "0.4.2", "numpy": "1.26", "pillow": "9.5", "pyyaml": "6.0", "filelock": "3.12", "jinja2": "3.1",
}  # fmt: skip
HELD = ("torch", "numpy")  # which an environment takes from the program, at its versions
PACKAGES = "diffusers==0.31.0", "transformers==4.46.3", "huggingface_hub>=0.26,<1", "accelerate>=0.31,<2"
SMALL = ("safetensors", "pillow", "pyyaml", "filelock", "jinja2")
MEGABYTES = 170
ASK = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
TRIAL = "import filelock, jinja2, yaml; from diffusers import AutoencoderKL, UNet2DConditionModel; " + (
    "from transformers import CLIPTextModel, CLIPTokenizer"
)
_work: dict[Path, str] = {}
_lock = threading.Lock()


def folder(host: Host) -> Path:
    """Where our environments are, or will be."""
    return host.data / "environment"


def _made(place: Path) -> Path | None:
    """The interpreter of the environment in use, if there is one."""
    try:
        name = (place / "current").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    found = _executable(place / name)
    return found if found.is_file() else None


@cache
def missing() -> tuple[str, ...]:
    """What this interpreter lacks in a fresh process, as text for people: this one may see more than a child will."""
    return _lacking(sys.executable)


def _lacking(python: str) -> tuple[str, ...]:
    versions = json.loads(_run([python, "-c", ASK, *LOWEST]))
    found = []
    for name, lowest in LOWEST.items():
        if name not in versions:
            found.append(f"{name} (none)")
        elif _numbers(versions[name]) < _numbers(lowest):
            found.append(f"{name} {lowest} (has {versions[name]})")
    return tuple(found)


def _beyond_us() -> str | None:
    """Why Set up would be of no use, as text for people."""
    old = [text for text in missing() if text.split()[0] in HELD]
    if not old:
        return None
    return (
        f"Jobs need {' and '.join(old)} of this program's own, which Set up leaves as it is: update the program first."
    )


def python(host: Host) -> str:
    """The interpreter for jobs. Raises ConfigError where none has what is needed."""
    if not missing():
        return sys.executable
    if (why := _beyond_us()) is not None:
        raise ConfigError(why)
    ours = _made(folder(host))
    if ours is not None:
        return str(ours)
    raise ConfigError(f"this program's Python lacks {', '.join(missing())}: press Set up")


def state(host: Host) -> tuple[bool, str]:
    """Whether jobs can run, and a line for people."""
    place = folder(host)
    lacking = missing()
    if not lacking:
        return True, f"Ready: this program's own Python ({sys.version.split()[0]}) has all that is needed."
    if (why := _beyond_us()) is not None:
        return False, why
    if place in _work:
        return False, _work[place]
    if _made(place) is not None:
        return True, f"Ready: jobs run in the environment {place}."
    return False, (
        f"This program's Python lacks {', '.join(lacking)}. Set up makes an environment of salun's own at {place} "
        f"(about {MEGABYTES} MB, from the Python package index: {', '.join(PACKAGES)}), which uses this program's "
        "torch. Nothing of the program's own is changed."
    )


def set_up(host: Host, wait: bool = False) -> str:
    """Make the environment, in the background unless `wait`. Returns a line for people.

    Raises ConfigError where that would be of no use.
    """
    if not missing():
        return "There is nothing to set up."
    if (why := _beyond_us()) is not None:
        raise ConfigError(why)
    place = folder(host)
    with _lock:
        if place in _work and _work[place].startswith("Setting up"):
            return _work[place]
        _work[place] = f"Setting up {place}: this takes some minutes. Press Refresh the lists to see how it goes."
    thread = threading.Thread(target=_make, args=(place,), daemon=True)
    thread.start()
    if wait:
        thread.join()
    return _work.get(place, f"Ready: jobs run in the environment {place}.")


def _make(place: Path) -> None:
    before = _made(place)
    new = place / time.strftime("%Y%m%d-%H%M%S")
    try:
        if place.is_dir():
            for old in place.iterdir():  # of set-ups that failed, or that another followed: no job runs there
                if old.is_dir() and (before is None or old not in before.parents):
                    shutil.rmtree(old, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(new)])
        ours = _executable(new)
        own = _run([str(ours), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
        theirs = [p for p in sys.path if p.rstrip("/\\").endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({site!a})\n" for site in theirs]  # with the .pth files in them
        (Path(own) / "zz_salun_host.pth").write_text("".join(lines), encoding="ascii")
        held = new / "held.txt"
        held.write_text(f"torch=={metadata.version('torch')}\nnumpy=={metadata.version('numpy')}\n", encoding="utf-8")
        pip = [str(ours), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(held)]
        _run([*pip, *PACKAGES, *(f"{name}>={LOWEST[name]}" for name in SMALL)])
        _run([str(ours), "-c", TRIAL])
        if lacking := _lacking(str(ours)):
            raise RuntimeError(f"it lacks {', '.join(lacking)} all the same")
        write_bytes(place / "current", f"{new.name}\n".encode())
        _work.pop(place, None)
    except (OSError, RuntimeError, SalunError, metadata.PackageNotFoundError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = "" if before is None else " The environment there was is kept."
        _work[place] = f"The set-up failed: {error}.{kept}"


def _run(command: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}  # not what the system's language has it write
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:500] if lines else f"{command[1:4]} ended with {done.returncode}")
    return done.stdout


def _executable(place: Path) -> Path:
    return place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _numbers(version: str) -> tuple[int, ...]:
    found = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        found.append(int(digits))
    return tuple(found)
