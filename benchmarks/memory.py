"""Peak memory of an erasure on a GPU, simulated: the table in docs/performance.md.

    python benchmarks/memory.py                       all rows; each takes seconds and is cached
    python benchmarks/memory.py --check               training steps in this CPU's memory, against their simulation

No GPU, no model and no download is needed: the checkpoints are hollow (names and shapes of the published ones), and the
steps run on fake tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from salun.diffusion.model.loading import describe, load_with
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.simulate import Needs, losses_of, masked_optimizer, simulate, training_data
from salun.masking.training import take_step
from salun.progress import Stage
from salun.runs.cache import Cache
from tools import checkpoints

MODELS = {"SD 1.5, 512²": ("sd1", 512), "SD 2.1, 768²": ("sd2", 768), "SDXL, 1024²": ("sdxl", 1024)}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "`--gradient-checkpointing`": {"gradient_checkpointing": True},
    "the same, `--optimizer adam8bit`": {"gradient_checkpointing": True, "optimizer": "adam8bit"},
    "`--low-vram`": {"low_vram": True},
}
BATCHES = (1, 4, 8)
GIB, MIB = 2**30, 2**20


def needs_of(path: Path, resolution: int, batch: int, dtype: torch.dtype, device: str, **options: Any) -> Needs:
    """The simulated needs of an erasure of nudity."""
    spec = describe(str(path))
    chosen = EraseOptions(batch_size=batch, resolution=resolution, **options)
    return simulate(
        spec, make_plan(spec.settings, path.stem, "nudity", chosen), torch.device(device), dtype, Cache.of_user()
    )


def table(folder: Path) -> None:
    """Print the table of all models, batches and options."""
    print("| model, bf16 | options | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |")
    print("|---|---|" + "---|" * len(BATCHES))
    for title, (family, resolution) in MODELS.items():
        path = checkpoints.make(folder / f"{family}.safetensors", family, size="true", hollow=True)
        for variant, options in VARIANTS.items():
            found = [needs_of(path, resolution, batch, torch.bfloat16, "cuda", **options) for batch in BATCHES]
            cells = [f"{needs.most / GIB:.1f} ({max(needs.peak, key=needs.peak.__getitem__)})" for needs in found]
            print(f"| {title} | {variant} | " + " | ".join(cells) + " |", flush=True)


def check(name: str, batch: int, resolution: int | None) -> None:
    """Print what torch allocates at most in training steps of a model on this CPU, and the simulation of that."""
    options = EraseOptions(batch_size=batch, resolution=resolution, device="cpu", dtype="fp32")
    spec = describe(name)
    concept = {"shapes": "circle", "digits": "class:3"}.get(name, "nudity")
    plan = make_plan(spec.settings, spec.name, concept, options)
    needs = simulate(spec, plan, torch.device("cpu"), torch.float32, Cache.of_user())
    model = load_with(name, options)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    parts = [part for part in (model.unet, model.vae, *model.text_encoders) if part is not None]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    real = weights + max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    simulated = needs.peak[Stage.TRAINING]
    print(f"{name}, batch {batch}: simulated {simulated / MIB:,.0f} MiB, allocated {real / MIB:,.0f} MiB: "
          f"{simulated / real - 1:+.1%}")  # fmt: skip


def step(model: Any, plan: Plan) -> None:
    """Two training steps, the second with moments, and no frozen targets of other steps."""
    with model.temporarily_trainable(), model.configured(plan.options):
        data = training_data(model, plan)
        with masked_optimizer(model, plan, cached=True) as optimizer:
            for number in range(2):
                take_step(optimizer, lambda number=number: losses_of(model, plan, data, number), 0, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="?", const="shapes", metavar="MODEL", help="model to take a real step of")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int)
    args = parser.parse_args()
    if args.check:
        check(args.check, args.batch, args.resolution)
        return
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder))


if __name__ == "__main__":
    main()
