"""Sizes of sparse deltas, also compressed, and the time and memory of making and applying them.

    python benchmarks/delta.py [--scale 1.0] [--output docs/delta-sizes.md]

Writes the page. The UNet has Stable Diffusion 1.5's shapes; with `--scale 0.01` it has about a hundredth of the
parameters. The weights and the fine-tune are random: see the page's introduction. Each command runs in its own process,
which gives its peak memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "delta-sizes.md"
DENSITIES = (0.5, 0.1, 0.01)
LR, STEPS = 1e-5, 100  # the authors' for nudity: one pass over 800 images in batches of 8
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
CHUNK = 8 * 2**20


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Stable Diffusion 1.5's UNet, its widths times √scale (in steps of 32)."""
    from diffusers import UNet2DConditionModel

    widths = tuple(max(32, 32 * round(width * math.sqrt(scale) / 32)) for width in (320, 640, 1280, 1280))
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, block_out_channels=widths)
    return {name: tuple(p.shape) for name, p in unet.named_parameters()}


class Weights(Mapping[str, Tensor]):
    """Lazily made fp16 weights, always the same: uniform within ±1/√inputs, norms around 1, small biases.

    density: None for the base; else the fraction of the weights, chosen at random, that a fine-tune changed.
    """

    def __init__(self, scale: float, density: float | None = None) -> None:
        self.shapes, self.density = shapes(scale), density

    def __getitem__(self, name: str) -> Tensor:
        shape, number = self.shapes[name], list(self.shapes).index(name)
        generator = torch.Generator().manual_seed(number)
        if len(shape) == 1:
            values = torch.randn(shape, generator=generator) / 50 + ("norm" in name and name.endswith("weight"))
        else:
            values = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(math.prod(shape[1:]))
        base = values.half()
        if self.density is None:
            return base
        chosen = torch.rand(shape, generator=generator) < self.density
        step = torch.randn(shape, generator=generator) * LR * math.sqrt(STEPS)
        return torch.where(chosen, (base.float() + step).half(), base)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_folder(folder: Path, weights: Weights) -> None:
    """The files of a diffusers folder that deltas read."""
    from salun.checkpoints import safetensors_io

    described = {name: (torch.float16, shape) for name, shape in weights.shapes.items()}
    safetensors_io.write_lazily(folder / UNET, described, weights)
    (folder / "model_index.json").write_text("{}", encoding="utf-8")


def compressors() -> dict[str, Callable[[], Any]]:
    """The installed compressors: label → factory of an object with `compress` and `flush`."""
    available: dict[str, Callable[[], Any]] = {
        "zlib, level 6": lambda: zlib.compressobj(6),
        "lzma, preset 1": lambda: lzma.LZMACompressor(preset=1),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        available["zstandard, level 3"] = lambda: zstandard.ZstdCompressor(level=3).compressobj()
    return available


def compressed(path: Path, make: Callable[[], Any]) -> int:
    """Bytes of a file after compression; the compressed data are discarded."""
    compressor, total = make(), 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            total += len(compressor.compress(block))
    return total + len(compressor.flush())


def run(task: str, *arguments: str) -> dict[str, Any]:
    """A function of `salun.delta.commands` in a process of its own: its facts, `seconds`, `peak` bytes of memory."""
    command = [sys.executable, __file__, "--task", task, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def work(task: str, *arguments: str) -> None:
    """The child process of `run`."""
    from salun.delta import commands as deltas

    began = time.perf_counter()
    facts = getattr(deltas, task)(*arguments) if task != "nothing" else {}
    seconds = time.perf_counter() - began
    print(json.dumps({**facts, "seconds": seconds, "peak": peak()}))


def peak() -> int:
    """Bytes of this process in memory at most. (Linux' getrusage would count the process that started it.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(scale: float, folder: Path) -> str:
    """The page's text."""
    write_folder(folder / "base", Weights(scale))
    unet = (folder / "base" / UNET).stat().st_size
    bare = run("nothing")["peak"]
    sizes, costs = [], []
    packers = compressors()
    for density in DENSITIES:
        write_folder(folder / "erased", Weights(scale, density))
        base, erased, delta = f"{folder}/base/", f"{folder}/erased/", f"{folder}/x.salun.safetensors"
        made = run("extract", base, erased, delta)
        applied = run("apply", base, delta, f"{folder}/again/")
        undone = run("undo", f"{folder}/again/", delta, f"{folder}/back/")
        assert applied["result_hash"] == made["result_hash"]
        assert undone["base_hash"] == made["base_hash"]
        packed = [compressed(Path(delta), make) for make in packers.values()]
        row = [f"{density:g}", f"{made['density']:.1%}", *(_size(n, unet) for n in (made["bytes"], *packed))]
        sizes.append("| " + " | ".join(row) + " |")
        cells = [f"{r['seconds']:.1f} s, {(r['peak'] - bare) / 2**20:,.0f} MiB" for r in (made, applied, undone)]
        costs.append(f"| {density:g} | " + " | ".join(cells) + " |")
        print(sizes[-1], costs[-1], sep="\n", file=sys.stderr, flush=True)
        _empty(folder, "erased", "again", "back", "x.salun.safetensors")
    heads = ["density", "weights that differ", "delta", *packers]
    entries = sum(map(math.prod, shapes(scale).values()))
    option, aside = ("", "") if scale == 1 else (f" --scale {scale:g}", ", not of Stable Diffusion 1.5's size")
    return f"""# Sizes of sparse deltas

**What it shows.** A delta that changes half of the weights of SD 1.5's UNet takes 55 % of the UNet's file, one of a
tenth 16 %, and one of a hundredth 3 %; compressed, a good half of that. So small deltas need a low density. Applying
or undoing one takes 8 to 24 seconds on one core. Sizes are of simulated steps on random weights.

Written by `benchmarks/delta.py{option}`: a UNet of {entries / 1e6:,.1f} M random fp16 weights{aside},
{unet / 1e6:,.0f} MB.

**Anyone with a delta can undo the erasure.** If a concept must not come back, publish the model, not the delta.

The fine-tune is simulated. Weights are selected at random at the given density; each
changes by a normal deviate of scale lr·√steps = {LR * math.sqrt(STEPS):g} (lr {LR:g}, {STEPS} steps), as far as Adam
moves where gradients are mostly noise. Rounding to fp16 undoes some of these steps, so that fewer weights differ
than were selected. A real mask is denser in some layers than in others and real steps are less random, so that real
deltas may be smaller, above all when compressed; longer training makes them larger.

| {" | ".join(heads)} |
|{"---|" * len(heads)}
{chr(10).join(sizes)}

In MB, and as a percentage of the UNet's file. A delta has one bit for each weight of the tensors that changed, or four
bytes for each changed weight where these are fewer, and the XOR of each changed weight's old and new bits. Of that XOR
the upper byte is mostly zero, since a small step seldom reaches the exponent, and the lower one is noise: therefore a
compressor halves the file. The file is not compressed, as with all safetensors; compress it to send it.

## Time and memory

`salun delta extract`, `apply` and `undo` on folders, memory beyond the {bare / 2**20:,.0f} MiB of Python with PyTorch.
apply and undo read the model twice: hashing it before and after, then writing. torch {torch.__version__},
{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores.

| density | extract | apply | undo |
|---|---|---|---|
{chr(10).join(costs)}
"""


def _size(size: int, unet: int) -> str:
    return f"{size / 1e6:,.1f} MB, {size / unet:.1%}"


def _empty(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="Number of parameters, relative to Stable Diffusion 1.5's"
    )
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        work(*arguments.task)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = measure(arguments.scale, Path(folder))
    arguments.output.write_text(text, encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
