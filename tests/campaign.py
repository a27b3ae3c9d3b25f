"""A seeded campaign of hostile inputs: each case must end in a result or one error of ours, soon and in little memory.

A test module gives `attack(folder, numbers) -> Findings`; `in_child` runs it in a process of its own, so that a case
that never ends or takes the machine's memory fails the test alone. One case by hand:

    python -m tests.campaign tests.test_campaign_runs FOLDER --case 123
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from salun.errors import SalunError

SECONDS = 5.0  # of wall time, for one action on one case; on a slow machine twice what undamaged files take, up to MOST
MOST = 10.0
MEMORY = 1_000_000_000  # bytes, of which torch and diffusers take half before anything is read
LONGEST = 2_000  # characters of a message
ROOT = Path(__file__).parents[1]


@dataclass
class Findings:
    """What a campaign found. accepted: by action, how many cases it took for sound. slowest: seconds of one action.

    undamaged: by action, its seconds on files that nobody damaged.
    """

    folder: Path
    undamaged: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    accepted: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def time(self, name: str, action: Callable[[], object]) -> None:
        """Time an action on undamaged files, where it must succeed, without the cache and after all imports."""
        (self.folder / "number").write_text(f"undamaged, {name}", encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SALUN_CACHE_SIZE", "0")
            action()
            began = time.monotonic()
            action()
            self.undamaged[name] = time.monotonic() - began

    def attempt(self, number: int, name: str, action: Callable[[], object]) -> bool:
        """Run an action on case `number`; notes a traceback, a message of many lines, or too long a time.

        Returns:
            Whether the action took the case for sound.
        """
        (self.folder / "number").write_text(f"{number}, {name}", encoding="utf-8")  # for a case that never ends
        began, accepted = time.monotonic(), False
        try:
            action()
            accepted = True
        except SalunError as error:
            if len(str(error)) > LONGEST or "Traceback" in str(error):
                self.failures.append(f"case {number}, {name}: {len(str(error))} characters: {str(error)[:300]!r}")
        except Exception:
            self.failures.append(f"case {number}, {name}: {traceback.format_exc()[-1500:]}")
        seconds = time.monotonic() - began
        self.slowest = max(self.slowest, seconds)
        if seconds > max(SECONDS, min(2 * self.undamaged.get(name, 0.0), MOST)):
            self.failures.append(f"case {number}, {name}: {seconds:.1f} s")
        self.accepted[name] += accepted
        return accepted


def peak_memory() -> int:
    """Bytes. Linux's own count: getrusage's begins with what the parent process had."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(module: str, folder: Path, cases: int, seconds: float = 300.0) -> dict[str, Any]:
    """The findings of `module.attack` over `range(cases)`, from a process of its own; fails the test on any failure."""
    command = [sys.executable, "-m", "tests.campaign", module, str(folder), "--cases", str(cases)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail(f"case {(folder / 'number').read_text(encoding='utf-8')} did not end")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    failures = found["failures"]
    assert not failures, "\n".join([f"{len(failures)} failures of {cases} cases", *failures[:10]])
    assert found["memory"] < MEMORY, f"{found['memory'] / 1e6:.0f} MB"
    return found


def main() -> None:
    """The child process: all cases, or one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    numbers = range(given.cases) if given.case is None else range(given.case, given.case + 1)
    found: Findings = importlib.import_module(given.module).attack(given.folder, numbers)
    print(json.dumps({**vars(found), "folder": str(found.folder), "memory": peak_memory()}))


if __name__ == "__main__":
    main()
