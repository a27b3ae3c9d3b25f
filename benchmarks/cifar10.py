"""CIFAR-10 as a folder of JPEG files: the original models, and how fast an epoch is.

    python benchmarks/cifar10.py train --data DIR           # the original with seed 1 (--seeds 1 2 3 for several)
    python benchmarks/cifar10.py train --data DIR --forget random:0.1 class:cat   # and Retrain for these forget sets

DIR holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. Training takes hours on a CPU. It can be interrupted at any
time; the same command continues it. Models and state are written to build/cifar10 (--out), which git ignores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from salun.classification.experiment import setup_of, train
from salun.classification.unlearn_options import UnlearnOptions
from salun.display import shown
from salun.runs.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
RECIPE: dict[str, Any] = {
    "model": "resnet20", "augment": "crop-flip", "train_epochs": 40, "train_lr": 0.1, "train_batch_size": 128,
    "weight_decay": 5e-4, "dtype": "bf16", "device": "cpu",
}  # fmt: skip


def train_originals(data: str, out: Path, seeds: list[int], forget: list[str]) -> None:
    """Train the original of each seed, then Retrain for each forget set, all of them resumable."""
    cache = Cache(out / "cache")
    for seed in seeds:
        folder = out / f"original-{seed}"
        if not _is_done(folder):
            resume = (folder / "run.json").exists()
            train(data=data, seed=seed, run_dir=folder, resume=resume, cache=cache, **RECIPE)
        for name in forget:
            options = UnlearnOptions(data=data, seed=seed, forget=name, original=str(folder), retrain="yes", **RECIPE)
            with shown(None) as progress:
                setup_of(options, cache).retrained(progress)


def _is_done(folder: Path) -> bool:
    path = folder / "run.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", required=True)
    training.add_argument("--out", type=Path, default=ROOT / "build" / "cifar10")
    training.add_argument("--seeds", type=int, nargs="+", default=[1])
    training.add_argument("--forget", nargs="*", default=[])
    arguments = parser.parse_args()
    train_originals(arguments.data, arguments.out, arguments.seeds, arguments.forget)


if __name__ == "__main__":
    main()
