"""Kill a run at random moments, resume it, and compare it with an uninterrupted run.

    python tools/kill.py -n 50 --seed 0 [--goal]

A short erasure, with --goal one towards a goal, is started in its own process and killed (SIGKILL) after a random
fraction of the time that a complete run takes. It must leave no incomplete file, and the same command with --resume
must give files that are byte-identical to those of the complete run. One line per kill; exit code 1 if any outcome is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from salun.checkpoints.safetensors_io import read_header
from salun.errors import SalunError
from salun.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
JOB = "--concept circle --model shapes --device cpu --batch-size 4 --forget-latents 8 --retain-latents 8"
JOB += " --eval-images 4 --sampling-steps 6 --save-every 0 --seed 0"
STEPS, GOAL = " --steps 6", " --until ua>=0.5,retain_drift<=0.3 --steps 36"
TIMES = {"run.json", "report.html", "log.txt", ".lock"}  # they hold times, or nothing


def start(folder: Path, job: str) -> subprocess.Popen[bytes]:
    """Start or resume the job in `folder`/run, with its output in `folder`/output.txt."""
    command = [sys.executable, "-m", "salun", "erase", *job.split(), "--run-dir", "run", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SALUN_CACHE": str(folder / "cache")}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def contents(run: Path) -> dict[str, str]:
    """Hash of every file of a run folder, except those that contain times."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in TIMES]
    return {p.relative_to(run).as_posix(): sha256_file(p) for p in files}


def half_files(folder: Path) -> list[str]:
    """Incomplete files under final names."""
    names = []
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" and ".tmp" not in str(path):
            try:
                read_header(path)
            except SalunError:
                names.append(path.name)
        elif path.name == "run.json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                names.append(path.name)
    return names


def state_of(run: Path) -> str:
    """How far a killed run had come, by what it left."""
    if not (run / "run.json").is_file():
        return "nothing begun"
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    saved = run / "state" / "training.safetensors"
    steps = len(json.loads(read_header(saved).metadata["history"])) if saved.is_file() else 0
    return f"{record['status']}, after {', '.join(record['timings']) or 'the start'}, {steps} steps saved"


def is_finished(run: Path) -> bool:
    """Whether the run's status is done and its report complete."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return record["status"] == "done" and (run / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def main(n: int, seed: int, folder: Path, job: str = JOB + STEPS) -> int:
    """Kill n times; returns how many outcomes were wrong."""
    began = time.monotonic()
    complete = folder / "whole"
    if start(complete, job).wait():
        sys.exit((complete / "output.txt").read_text(encoding="utf-8"))
    length = time.monotonic() - began
    expected = contents(complete / "run")
    chance, wrong = random.Random(seed), 0
    for i in range(n):
        place = folder / f"kill-{i}"
        process, moment = start(place, job), length * chance.uniform(0.02, 1.0)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left, half = state_of(place / "run"), half_files(place)
        finished = left.startswith("done")
        code = 0 if finished else start(place, job).wait()
        good = not half and code == 0 and contents(place / "run") == expected and is_finished(place / "run")
        wrong += not good
        verdict = "byte-identical" if good else f"WRONG (incomplete files: {half}, exit code {code}): {place}"
        print(f"{i + 1:3} killed at {moment:5.1f} of {length:.1f} s ({left}): {verdict}", flush=True)
        if good:
            shutil.rmtree(place)
    print(f"{n - wrong} of {n} outcomes are correct", flush=True)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goal", action="store_true", help="an erasure towards a goal")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        job = JOB + (GOAL if arguments.goal else STEPS)
        sys.exit(1 if main(arguments.n, arguments.seed, Path(place), job) else 0)
