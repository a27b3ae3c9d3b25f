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
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from benchmarks.step import reference_step
from salun.classification.models import ResNet18
from salun.compute.device import deterministic_kernels
from salun.diffusion.model.loading import describe
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.simulate import Needs, losses_of, masked_optimizer, operations, simulate, training_data
from salun.masking.mask import Mask
from salun.masking.training import take_step
from salun.progress import Event
from salun.runs.cache import Cache, key_of
from tools import checkpoints

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MOST = 540, 120  # in all, and for one part
STEPS = 5  # that are timed, after two that are not
BATCHES = (1, 4, 8)
GIB = 2**30
Part = Callable[["Bench"], dict[str, Any]]


class Bench:
    """Where and at what size to measure.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        size: Of the checkpoints: "true" or "small".
        folder: For checkpoints and runs.
    """

    def __init__(self, device: str, size: str, folder: Path) -> None:
        self.device, self.size, self.folder = torch.device(device), size, folder
        self.rehearsal = device == "cpu"
        self.dtype = "fp32" if self.rehearsal else "bf16"
        self.session = ExitStack()  # of contexts that last as long as the process

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object], steps: int = STEPS) -> float:
        """The median time of a step."""
        times = []
        for _ in range(2 + steps):
            self.wait()
            began = time.perf_counter()
            step()
            self.wait()
            times.append(time.perf_counter() - began)
        return sorted(times[2:])[steps // 2]

    def peak(self) -> int:
        """Bytes that were allocated on the device at most."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def plan(self, family: str, batch: int, **options: Any) -> tuple[Any, Plan]:
        """Files of a family, and the plan of an erasure from them."""
        path = self.folder / f"{family}.safetensors"
        if not path.exists():
            checkpoints.make(path, family, size=self.size, hollow=True)
        spec = describe(str(path))
        small = {"resolution": 64} if self.rehearsal else {}
        chosen = EraseOptions(batch_size=batch, dtype=self.dtype, device=str(self.device), **small, **options)
        return spec, make_plan(spec.settings, family, "nudity", chosen)


def correctness(bench: Bench) -> dict[str, Any]:
    """The same small erasure on the CPU and on the device, in fp32; and host synchronizations in a training step."""
    import salun

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    few: dict[str, Any] = {"steps": 6, "batch_size": 4, "forget_latents": 8, "retain_latents": 8, "eval_images": 0}
    here = salun.erase("shapes", "circle", device="cpu", dtype="fp32", seed=0, **few)
    there = salun.erase("shapes", "circle", device=str(bench.device), dtype="fp32", seed=0, **few)
    here.mask.save(bench.folder / "mask.safetensors")
    few["mask"] = str(bench.folder / "mask.safetensors")
    same = salun.erase("shapes", "circle", device=str(bench.device), dtype="fp32", seed=0, **few)
    base = here.model.original()
    change, other = (
        torch.cat([(run.erased[name].float() - base[name].float()).flatten() for name in sorted(here.erased)])
        for run in (here, same)
    )
    return {
        "jaccard of the masks": here.mask.jaccard(there.mask),
        "relative difference of the changes, same mask": float((change - other).norm() / change.norm()),
    }


def synchronizations(bench: Bench) -> dict[str, Any]:
    """How often the host waits for the device in a training step of SD 1.5."""
    step, _ = _salun_step(bench, "sd1", 1)
    step()
    step()
    bench.wait()
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    return {"count": len(places), "places": sorted(set(places))}


def _salun_step(bench: Bench, family: str, batch: int, **options: Any) -> tuple[Callable[[], object], dict[str, Any]]:
    """A training step on random weights, and its simulation: bytes at most, floating-point operations."""
    from salun.diffusion.model.loading import load_with

    spec, plan = bench.plan(family, batch, **options)
    model = load_with(spec.name, plan.options)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.normal_(0, 0.02)
    needs, counts = simulated(spec, plan, bench)
    bench.session.enter_context(model.configured(plan.options))
    bench.session.enter_context(deterministic_kernels(plan.options.deterministic))
    model.unet.requires_grad_(False)
    data = training_data(model, plan)
    cpu = bench.device.type == "cpu"
    optimizer = masked_optimizer(model, plan, cached=cpu, cpu_offload=plan.options.low_vram)
    samples = 2 * plan.recipe.batch_size
    facts = {
        "simulated": max(size for stage, size in needs.peak.items() if stage == "training"),
        "operations": samples * sum(counts),
    }
    count = iter(range(10**6))
    return lambda: take_step(optimizer, lambda _: losses_of(model, plan, data, next(count)), 0, {}), facts


def simulated(spec: Any, plan: Plan, bench: Bench) -> tuple[Needs, tuple[int, int]]:
    """What a plan needs and its operations, from the results' folder where `--prepare` left them."""
    cache = Cache(ROOT / "benchmarks" / "results" / "gpu" / "simulated") if not bench.rehearsal else Cache(bench.folder)
    dtype = torch.float32 if bench.rehearsal else torch.bfloat16
    needs = simulate(spec, plan, bench.device, dtype, cache)
    key = key_of(what="operations", family=str(spec.family), size=bench.size, resolution=plan.sampling.resolution)
    stored = cache.get(key)
    if stored is None:
        stored = {"counts": torch.tensor(operations(spec, plan, dtype))}
        cache.put(key, stored)
    forward, backward = stored["counts"].tolist()
    return needs, (forward, backward)


def prepare() -> None:
    """Simulate all steps now, which needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("cuda", "true", Path(folder))
        for family, batch, options in STEPS_OF.values():
            simulated(*bench.plan(family, batch, **options), bench)


def _step_part(family: str, batch: int, **options: Any) -> Part:
    """Time, memory and utilization of salun's training step."""

    def measure(bench: Bench) -> dict[str, Any]:
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step, facts = _salun_step(bench, family, batch, **options)
        seconds = bench.seconds(step)
        return {
            "seconds": seconds,
            "allocated": bench.peak(),
            "simulated": facts["simulated"],
            "tflops": facts["operations"] / seconds / 1e12,
        }

    return measure


def reference(bench: Bench) -> dict[str, Any]:
    """The authors' loop on SD 1.5 in fp32, batch 8, or 1 in a rehearsal."""
    if bench.rehearsal:
        return {"skipped": "the reference has SD 1.5's true size"}
    args = argparse.Namespace(device="cuda", latent=64, batch=[8])
    torch.cuda.reset_peak_memory_stats()
    return {"seconds": bench.seconds(reference_step(args), 3), "allocated": bench.peak()}


def matrix_product(bench: Bench) -> dict[str, Any]:
    """The speed of a large product of matrices, which utilization is relative to."""
    side = 256 if bench.rehearsal else 8192
    dtype = torch.float32 if bench.rehearsal else torch.bfloat16
    a = torch.randn(side, side, device=bench.device, dtype=dtype)
    return {"tflops": 2 * side**3 / bench.seconds(lambda: a @ a) / 1e12}


def erasure(bench: Bench) -> dict[str, Any]:
    """An erasure from SD 1.5's shapes, few steps and images: the seconds of its stages."""
    import salun

    path = checkpoints.make(bench.folder / "random.safetensors", "sd1", size=bench.size)
    few = {"steps": 20, "batch_size": 4, "forget_latents": 8, "retain_latents": 8, "eval_images": 4}
    if bench.rehearsal:
        few = {
            "steps": 1,
            "batch_size": 1,
            "forget_latents": 1,
            "retain_latents": 1,
            "eval_images": 1,
            "resolution": 64,
        }
    began: dict[str, float] = {}
    ended: dict[str, float] = {}

    def progress(event: Event) -> None:
        began.setdefault(str(event.stage), time.perf_counter())
        ended[str(event.stage)] = time.perf_counter()

    start = time.perf_counter()
    options = {"device": str(bench.device), "dtype": bench.dtype, "sampling_steps": 1 if bench.rehearsal else 50, **few}
    salun.erase(str(path), "nudity", seed=0, progress=progress, **options)
    stages = {stage: ended[stage] - began[stage] for stage in began}
    return {"seconds": time.perf_counter() - start, "stages": stages, "allocated": bench.peak()}


def classification(bench: Bench) -> dict[str, Any]:
    """Images a second of masked training of ResNet-18, against the authors' loop (the mask multiplied in)."""
    from salun.masking.optim import MaskedOptimizer

    batch = 8 if bench.rehearsal else 256
    x = torch.randn(batch, 3, 32, 32, device=bench.device)
    y = torch.randint(10, (batch,), device=bench.device)

    def plain() -> Callable[[], object]:
        torch.manual_seed(0)
        model = ResNet18(3, 10).to(bench.device)
        masks = {name: torch.rand_like(p) < 0.5 for name, p in model.named_parameters()}
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

        def step() -> None:
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    p.grad *= masks[name]
            sgd.step()

        return step

    def masked() -> Callable[[], object]:
        torch.manual_seed(0)
        model = ResNet18(3, 10).to(bench.device)
        named = dict(model.named_parameters())
        mask = Mask.random({name: p.detach().cpu() for name, p in named.items()}, 0.5, 0)
        fused = bench.device.type == "cuda"
        optimizer = MaskedOptimizer(
            named, mask, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused), "pack"
        )

        def step() -> None:
            optimizer.backward(F.cross_entropy(model(x), y))
            optimizer.step()

        return step

    times = {"authors": bench.seconds(plain(), 20), "salun": bench.seconds(masked(), 20)}
    return {**{name: batch / seconds for name, seconds in times.items()}, "ratio": times["authors"] / times["salun"]}


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of a training step of SD 1.5 goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    step, _ = _salun_step(bench, "sd1", 1 if bench.rehearsal else 4)
    step()
    bench.wait()
    cuda = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profiled(activities=kinds) as profiler:
        step()
        bench.wait()
    averages = profiler.key_averages()
    launches = sum(each.count for each in averages if each.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return {"launches": launches, "text": averages.table(sort_by=order, row_limit=25, max_name_column_width=60)}


STEPS_OF: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"SD 1.5, batch {batch}": ("sd1", batch, {}) for batch in BATCHES},
    "SD 1.5, batch 8, gradient checkpointing": ("sd1", 8, {"gradient_checkpointing": True}),
    "SD 1.5, batch 8, low VRAM": ("sd1", 8, {"low_vram": True}),
    **{f"SDXL, batch {batch}": ("sdxl", batch, {"gradient_checkpointing": True}) for batch in (1, 4)},
    "SDXL, batch 1, low VRAM": ("sdxl", 1, {"low_vram": True}),
}
PARTS: dict[str, Part] = {
    "matrix product": matrix_product,
    "correctness": correctness,
    "synchronizations": synchronizations,
    "SD 1.5, batch 8, the authors' loop": reference,
    "classification": classification,
    **{name: _step_part(family, batch, **options) for name, (family, batch, options) in STEPS_OF.items()},
    "erasure": erasure,
    "profile": profile,
}


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
        if "error" not in found:
            results["parts"][name] = found
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
    for name in ("correctness", "synchronizations", "classification", "erasure"):
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
