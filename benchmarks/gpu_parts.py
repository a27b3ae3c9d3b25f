"""The parts of `benchmarks/gpu.py`, each a function of a `Bench` that returns its results as JSON."""

from __future__ import annotations

import argparse
import sys
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
from salun.classification.networks import resnet18
from salun.compute.device import deterministic_kernels
from salun.diffusion.model.loading import describe
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.simulate import Needs, losses_of, masked_optimizer, operations, simulate, training_data
from salun.masking.mask import Mask
from salun.masking.training import take_step
from salun.progress import silent
from salun.runs.cache import Cache, key_of
from tools import checkpoints

ROOT = Path(__file__).resolve().parents[1]
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
        """The median time of a step; in a rehearsal of one."""
        steps = 1 if self.rehearsal else steps
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


def _salun_step(
    bench: Bench, family: str, batch: int, cached: bool = False, **options: Any
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A training step on random weights, and its simulation: bytes at most, floating-point operations.

    Args:
        cached: Whether the indices of selected weights are held on a GPU too.
    """
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
    cached = cached or bench.device.type == "cpu"
    optimizer = masked_optimizer(model, plan, cached=cached, cpu_offload=plan.options.low_vram)
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


def _network_step(bench: Bench) -> tuple[Any, Callable[[], object]]:
    """SD 1.5's network, and one forward and backward of it."""
    from salun.diffusion.model.loading import load_with

    spec, plan = bench.plan("sd1", 1 if bench.rehearsal else 8)
    model = load_with(spec.name, plan.options)
    model.unet.requires_grad_(True)
    n = 2 * plan.recipe.batch_size
    x, t = torch.randn(n, *model.latent_shape, device=bench.device), torch.full((n,), 500, device=bench.device)
    prompts = model.encode([""]).expand(n)

    def step() -> None:
        model.predict(x, t, prompts).square().mean().backward()

    return model.unet, step


def channels_last(bench: Bench) -> dict[str, Any]:
    """Seconds of a forward and backward as it is, and with channels last, which no option sets (performance.md)."""
    network, step = _network_step(bench)
    as_it_is = bench.seconds(step)
    network.to(memory_format=torch.channels_last)
    return {"as it is": as_it_is, "channels last": bench.seconds(step)}


def compiled(bench: Bench) -> dict[str, Any]:
    """Seconds of a compiled forward and backward, which no option sets (performance.md), and of compiling."""
    network, step = _network_step(bench)
    network.compile(backend="eager" if bench.rehearsal else "inductor")
    began = time.perf_counter()
    step()
    bench.wait()
    return {"compiling": time.perf_counter() - began, "compiled": bench.seconds(step)}


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
    options = {"device": str(bench.device), "dtype": bench.dtype, "sampling_steps": 1 if bench.rehearsal else 50, **few}
    start = time.perf_counter()
    run = salun.erase(str(path), "nudity", seed=0, progress=silent, as_given=True, **options)
    return {"seconds": time.perf_counter() - start, "stages": run.record.timings, "allocated": bench.peak()}


def classification(bench: Bench) -> dict[str, Any]:
    """Images a second of masked training of ResNet-18, against the authors' loop (the mask multiplied in)."""
    from salun.masking.optim import MaskedOptimizer

    batch = 8 if bench.rehearsal else 256
    x = torch.randn(batch, 3, 32, 32, device=bench.device)
    y = torch.randint(10, (batch,), device=bench.device)

    def plain() -> Callable[[], object]:
        torch.manual_seed(0)
        model = resnet18(3, 10).to(bench.device)
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
        model = resnet18(3, 10).to(bench.device)
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
    "SD 1.5, batch 4, indices held": _step_part("sd1", 4, cached=True),
    "channels last": channels_last,
    "compiled": compiled,
}
