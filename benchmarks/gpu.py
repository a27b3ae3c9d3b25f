"""All measurements on a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py                       on the first GPU; prints where the results are
    python benchmarks/gpu.py --table FILE          the results as Markdown, for docs/performance.md
    python benchmarks/gpu.py --prepare             before: what needs no GPU
    python benchmarks/gpu.py --rehearse            all parts on the CPU at toy sizes: shows that the script works

Each part runs in a process of its own and its results are written at once, so that a run which is cut off, or runs out
of time, keeps what it has; another start skips the parts that are there. Weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_parts import GIB, PARTS, ROOT, STEPS_OF, Bench, simulated

SECONDS, MOST = 540, 120  # in all, and for one part


def prepare() -> None:
    """Simulate all steps now, which needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("cuda", "true", Path(folder))
        for family, batch, options in STEPS_OF.values():
            simulated(*bench.plan(family, batch, **options), bench)


def run_part(name: str, device: str) -> None:
    """Measure one part and print its result as the last line."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, "small" if device == "cpu" else "true", Path(folder))
        print(json.dumps(PARTS[name](bench)))


def run_all(output: Path, device: str, limit: float, only: list[str]) -> None:
    """Measure the parts that are not there yet, each in a process of its own, and save after each."""
    began = time.perf_counter()
    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"parts": {}}
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "CPU (a rehearsal at toy sizes)"
    results["torch"] = torch.__version__
    environment = {**os.environ, "SALUN_CACHE_SIZE": "0"}  # samples from a cache would not be timed
    for name in only or PARTS:
        left = limit - (time.perf_counter() - began)
        if name in results["parts"] or left < 5:
            continue
        command = [sys.executable, __file__, "--part", name, "--device", device]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=min(left, MOST), check=False, env=environment
            )
            lines = done.stdout.strip().splitlines()
            error = done.stderr.strip()[-2000:]
            found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": error}
        except subprocess.TimeoutExpired:
            found = {"error": f"not done after {min(left, MOST):.0f} s"}
        print(f"{time.perf_counter() - started:6.1f} s  {name}: {_line(found)}", flush=True)
        failed = results.setdefault("failed", {})
        failed.pop(name, None)
        (failed if "error" in found else results["parts"])[name] = found
        temporary = output.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(output)
    print(output)


def _line(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {str(value)[-300:]}"
                     for key, value in found.items() if key != "text")  # fmt: skip


def table(path: Path) -> None:
    """Print results as Markdown."""
    results = json.loads(path.read_text(encoding="utf-8"))
    parts = results["parts"]
    peak = parts.get("matrix product", {}).get("tflops")
    print(f"On {results['device']}, torch {results['torch']}.\n")
    print(
        "| step | seconds | allocated, GiB | simulated, GiB | TFLOP/s | of a matrix product |\n"
        "|---|---|---|---|---|---|"
    )
    for name, part in parts.items():
        if "seconds" in part and "stages" not in part:
            speed = part.get("tflops")
            cells = [f"{part['seconds']:.3f}", f"{part['allocated'] / GIB:.2f}"]
            cells += [f"{part['simulated'] / GIB:.2f}" if "simulated" in part else "–"]
            cells += [f"{speed:.0f}" if speed else "–", f"{speed / peak:.0%}" if speed and peak else "–"]
            print(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("correctness", "synchronizations", "classification", "erasure", "channels last", "compiled"):
        if name in parts:
            print(f"\n{name}: {_line(parts[name])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results (default: in benchmarks/results/gpu)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit in all (default: 540)")
    parser.add_argument("--only", action="append", default=[], choices=PARTS, metavar="PART", help="repeatable")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument(
        "--prepare", action="store_true", help="simulate all steps now, without a GPU, to save its time"
    )
    parser.add_argument("--table", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        table(args.table)
    elif args.prepare:
        prepare()
    elif args.part:
        run_part(args.part, args.device)
    else:
        device = "cpu" if args.rehearse else "cuda"
        if device == "cuda" and not torch.cuda.is_available():
            sys.exit("no GPU is here: --rehearse runs all parts on the CPU at toy sizes")
        name = "rehearsal" if args.rehearse else torch.cuda.get_device_name().lower().replace(" ", "-")
        output = args.output or ROOT / "benchmarks" / "results" / "gpu" / f"{name}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        run_all(output, device, args.seconds, args.only)


if __name__ == "__main__":
    main()
