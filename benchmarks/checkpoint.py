"""Full-size checkpoints: writing an erased one compared with a plain copy, and a complete erasure on a CPU.

    python -m benchmarks.checkpoint FOLDER        FOLDER takes 20 GB; writes docs/checkpoints.md. Resumes if stopped

Every row runs in its own process, which gives its peak memory (VmHWM, Linux only); the rows take turns, round after
round. The weights are random, of Stable Diffusion 1.5's names and shapes (tools/checkpoints.py). Copies are real
ones (no reflink) and synced, as the writer's are; the page cache holds the source in every row.

Just before its row each process writes the file's bytes to a scratch file and removes it, twice. A virtual machine that
gives freed memory back to its host pays for every page again when it is next filled: without this, one and the same
copy took between 1.0 and 5.7 seconds, by what had run before it, and the ratios came out anywhere from 0.5 to 2.7.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.patch import write_patched
from salun.checkpoints.single_file import open_unet
from tools.checkpoints import make

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "checkpoints.md"
CHUNK = 8 * 1024 * 1024
ERASE = shlex.split(
    "erase --concept nudity --device cpu --resolution 64 --steps 4 --batch-size 1 --forget-latents 2 "
    "--retain-latents 2 --eval-images 0"
)


class Moved(Mapping[str, Tensor]):
    """A UNet with the last bit of every weight flipped, made one tensor at a time, so that only writing is timed."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return (self.stored[name].view(torch.int16) ^ 1).view(torch.float16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def status(field: str) -> int:
    """Bytes of memory of this process, from a field of Linux' /proc/self/status."""
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    assert match is not None
    return int(match[1]) * 1024


def copy(base: Path, target: Path) -> None:
    """A plain copy, synced."""
    with base.open("rb") as source, target.open("wb") as out:
        while block := source.read(CHUNK):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def few(base: Path, target: Path) -> None:
    """An erased checkpoint in which the cross-attention changed."""
    stored = open_unet(base)
    write_patched(stored, target, {n: Moved(stored)[n] for n in stored if ".attn2." in n}, {"salun.concept": "x"})


def every(base: Path, target: Path) -> None:
    """An erased checkpoint in which every UNet tensor changed."""
    stored = open_unet(base)
    write_patched(stored, target, Moved(stored), {"salun.concept": "x"})


def digest(base: Path, target: Path) -> None:
    """sha256 of the file, as in run.json."""
    sha256 = hashlib.sha256()
    with base.open("rb") as source:
        while block := source.read(CHUNK):
            sha256.update(block)


ROWS: dict[str, Callable[[Path, Path], None]] = {
    "plain copy (baseline)": copy,
    "erased, cross-attention changed": few,
    "erased, all of the UNet changed": every,
    "sha256 of the file alone": digest,
}


def child(row: str, base: Path, target: Path) -> None:
    """Run a row and print its seconds and memory."""
    scratch = target.with_name("scratch.safetensors")
    for _ in range(2):
        copy(base, scratch)
        scratch.unlink()
    before = status("VmRSS")
    began = time.perf_counter()
    ROWS[row](base, target)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "memory": status("VmHWM") - before}))


def measured(base: Path, target: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """For each row the medians over the rounds and the seconds of every round; each run in its own process."""
    results: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(rounds):
        for row, runs in results.items():
            command = [sys.executable, __file__, str(target.parent), "--row", row]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
            runs.append(json.loads(done.stdout))
            target.unlink(missing_ok=True)
    return {
        row: {
            **{key: median(run[key] for run in runs) for key in ("seconds", "memory")},
            "all": sorted(run["seconds"] for run in runs),
        }
        for row, runs in results.items()
    }


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def erasure(base: Path, run: Path, extra: list[str]) -> dict[str, Any]:
    """Timings, rounding and peak memory of `salun erase` on the file; a run that was stopped is resumed."""
    record_file = run / "run.json"
    if not (record_file.is_file() and json.loads(record_file.read_text(encoding="utf-8"))["status"] == "done"):
        command = [
            sys.executable,
            "-m",
            "salun",
            *ERASE,
            *extra,
            "--model",
            str(base),
            "--run-dir",
            str(run),
            "--resume",
        ]
        subprocess.run(command, check=True, env={**environment(), "SALUN_CACHE_SIZE": "0"}, stdout=subprocess.DEVNULL)
    record = json.loads(record_file.read_text(encoding="utf-8"))
    return {key: record[key] for key in ("timings", "rounding", "peak_memory")}


def page(results: dict[str, Any]) -> str:
    """docs/checkpoints.md, from the results so far."""
    plain = results["rows"]["plain copy (baseline)"]["seconds"]
    out = [
        "# Full-size checkpoints",
        "",
        # written by hand: revise it after a new run
        "**What it shows.** Writing an erased checkpoint of SD 1.5's size is as fast as copying it and takes less "
        "than 200 MB of memory. A whole run on a CPU takes 10.9 GiB in bf16 with `--low-vram` and 12.7 GiB in "
        "fp32. Rounding to fp16 loses a quarter of the changes that four steps make. Weights are random, so that "
        "nothing is said here about the quality of an erasure.",
        "",
        f"Written by `benchmarks/checkpoint.py`: Stable Diffusion 1.5's names and shapes, fp16, random weights, "
        f"{results['bytes'] / 1e9:.2f} GB; torch {results['torch']}, {results['cores']} shared cores, no GPU. Medians "
        f"of {results['runs']} rounds in which the rows take turns, each in a process of its own that has just written "
        "and removed the same bytes twice (the script says why); memory beyond what the process held before.",
        "",
        "| writing | seconds (least to most) | relative to a copy | peak memory |",
        "|---|---|---|---|",
        *(
            f"| {row} | {result['seconds']:.2f} ({result['all'][0]:.2f} to {result['all'][-1]:.2f}) | "
            f"{result['seconds'] / plain:.2f} × | {result['memory'] / 1e6:.0f} MB |"
            for row, result in results["rows"].items()
        ),
        "",
        f"`salun {' '.join(ERASE)} --model FILE`, all stages to the written checkpoint and delta:",
        "",
        "| options | seconds per stage | peak CPU memory | weights changed; fraction lost to rounding |",
        "|---|---|---|---|",
    ]
    for extra, result in results["erasures"].items():
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["timings"].items())
        rounding, peak = result["rounding"], result["peak_memory"]["cpu_bytes"] / 2**30
        out.append(
            f"| {extra or 'defaults (fp32)'} | {stages} | {peak:.1f} GiB | {rounding['changed'] / 1e6:.0f} M, "
            f"{rounding['lost_to_rounding'] / max(rounding['changed'], 1):.0%} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    base = folder / "base.safetensors"
    if arguments.row:
        child(arguments.row, base, folder / "out.safetensors")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not base.is_file():
        make(base, "sd1", size="true")
    results: dict[str, Any] = {"bytes": base.stat().st_size, "torch": torch.__version__, "cores": os.cpu_count()}
    results["runs"] = arguments.runs
    results["rows"] = measured(base, folder / "out.safetensors", arguments.runs)
    results["erasures"] = {}
    for extra in ([], ["--dtype", "bf16", "--low-vram"]):
        results["erasures"][" ".join(extra)] = erasure(base, folder / f"run{len(results['erasures'])}", extra)
        PAGE.write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
