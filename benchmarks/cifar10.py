"""CIFAR-10 as a folder of JPEG files: the original models, a comparison of methods, and how fast an epoch is.

    python benchmarks/cifar10.py train --data DIR           # the original with seed 1 (--seeds 1 2 3 for several)
    python benchmarks/cifar10.py train --data DIR --forget random:0.1 class:cat   # and Retrain for these forget sets
    python benchmarks/cifar10.py compare --data DIR         # methods and Retrain in three settings, then the page
    python benchmarks/cifar10.py compare --data DIR --settings class:cat --seeds 1 --methods salun ft --dry-run
    python benchmarks/cifar10.py page                       # build/cifar10/results.md from what is measured
    python benchmarks/cifar10.py speed --data DIR           # training steps, against two other loops

DIR holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. Training takes hours on a CPU. It can be interrupted at any
time; the same command continues it. Models and state are written to build/cifar10 (--out), which git ignores.
All training takes one thread, as the jobs of a comparison do, so that these find the originals of `train` in its cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from salun.classification.compare import compare
from salun.classification.data import ImageData, load_data
from salun.classification.experiment import setup_of, train
from salun.classification.models import new_model
from salun.classification.plan import resolve_options
from salun.classification.preview import preview_comparison
from salun.classification.splits import make_split
from salun.classification.table import tables_of
from salun.classification.task import Task, cross_entropy, minimize, retain_batches
from salun.classification.unlearn_options import CompareOptions, UnlearnOptions
from salun.display import shown
from salun.files import write_bytes
from salun.masking.mask import Mask
from salun.runs.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cifar10"
PAGE = ROOT / "build" / "cifar10" / "results.md"
SETTINGS = {"random:0.1": "random 10 %", "random:0.5": "random 50 %", "class:cat": "one class"}
METHODS = ["salun", "rl", "ft", "ga", "l1-sparse", "scrub", "ssd"]
FIRST_SEED = 1  # of originals and comparisons alike
RECIPE: dict[str, Any] = {
    "model": "resnet20", "augment": "crop-flip", "train_epochs": 40, "train_lr": 0.1, "train_batch_size": 128,
    "weight_decay": 5e-4, "dtype": "bf16", "device": "cpu",
}  # fmt: skip


def train_originals(data: str, out: Path, seeds: list[int], forget: list[str]) -> None:
    """Train the original of each seed, then Retrain for each forget set, all of them resumable."""
    torch.set_num_threads(1)  # part of the key of a cached model
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


# -- comparison --------------------------------------------------------------------------------------------------------


def comparison(data: str, forget: str, seeds: int, methods: list[str], workers: int | None) -> CompareOptions:
    """The options of a setting's comparison, whose originals and Retrain models are those of `train_originals`."""
    shared: dict[str, Any] = {**RECIPE, "seed": FIRST_SEED, "order": "forget-first", "search_seeds": 1}
    return CompareOptions(data=data, forget=forget, seeds=seeds, methods=methods, workers=workers, **shared)


def compare_methods(options: CompareOptions, out: Path, dry_run: bool) -> None:
    """Run or resume the comparison of a setting and store its table; a dry run prints what there is to do."""
    torch.set_num_threads(1)
    name, cache = setting_name(options.forget or ""), Cache(out / "cache")
    if dry_run:
        planned = preview_comparison(options, run_dir=out / f"compare-{name}", cache=cache)
        shown_keys = ("forgetting", "forget", "methods", "seeds", "jobs", "workers")
        print(json.dumps({key: planned[key] for key in shown_keys}, indent=1))
        print(f"about {planned['seconds'] / 3600:.1f} h if nothing is in the cache")
        return
    done = compare(options, run_dir=out / f"compare-{name}", resume=True, cache=cache, command=f"cifar10.py: {name}")
    recorded = {key: value for key, value in done.record.options.items() if key != "data"}
    result = {"options": recorded, "versions": done.record.versions, "metrics": done.metrics}
    write_bytes(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def setting_name(forget: str) -> str:
    return forget.replace(":", "-")


def page(results: Path = RESULTS) -> str:
    """The document: a section for each setting, from its stored table or with a line that it is not measured yet."""
    stored = {forget: results / f"{setting_name(forget)}.json" for forget in SETTINGS}
    known = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in stored.items() if path.is_file()}
    verdicts = {name: (result["metrics"]["verdict"] or {"text": "no result"})["text"] for name, result in known.items()}
    shows = " ".join(f"{SETTINGS[name].capitalize()}: {text}." for name, text in verdicts.items()) or "Nothing yet."
    missing = ", ".join(SETTINGS[forget] for forget in stored if forget not in known)
    first = f"**What it shows.** {shows}" + (f" Not measured yet: {missing}." if missing else "")
    parts = ["# Unlearning on CIFAR-10 (JPEG)", ""]
    parts += [line for text in (first, *INTRODUCTION) for line in (fill(text, 118, break_on_hyphens=False), "")]
    for forget in stored:
        parts += [f"## {SETTINGS[forget].capitalize()}", ""]
        if forget not in known:
            parts += ["Not measured yet.", ""]
            continue
        result = known[forget]
        parts += [f"Forgotten: `{forget}`; seeds: {result['options']['seeds']}.", ""]
        for heading, rows in tables_of(result["metrics"]).items():
            if len(rows) > 1:
                parts += [f"### {heading}", "", *markdown(rows), ""]
    return "\n".join(parts)


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


INTRODUCTION = (
    "Written by `benchmarks/cifar10.py page` from what `compare` has measured: 60,000 JPEG files of 32×32 (CIFAR-10 at "
    "medium JPEG quality, so that values are close to those on the original files and not equal), ResNet-20 of 0.27 "
    "million weights trained for 40 epochs in bf16 on a CPU, one thread for each job. Each seed has its own original, "
    "forget set and Retrain. Each method's learning rate is searched on the first seed, without Retrain.",
    "Cells are mean ± standard deviation over seeds, with the gap to Retrain in parentheses. For the terms see "
    "[classification.md](classification.md), for more seeds on smaller data "
    "[classification-results.md](classification-results.md). ResNet-18, as in the paper, was not run.",
)


# -- speed -------------------------------------------------------------------------------------------------------------


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images that are padded, cropped, mirrored and normalized one by one, by Pillow and the GIL."""

    def __init__(self, data: ImageData, rows: Tensor) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images[rows]]
        self.labels: list[int] = data.labels[rows].tolist()
        self.mean, self.std = (torch.tensor(data.preset[key]).view(-1, 1, 1) for key in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(self.images[i], 4)
        left, top = (int(torch.randint(9, (1,))) for _ in range(2))
        image = image.crop((left, top, left + 32, top + 32))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float() / 255
        return (pixels - self.mean) / self.std, self.labels[i]


def in_memory(data: ImageData, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The plainest batches of tensors in memory: one shift for a whole batch, half of the images mirrored."""
    images, labels = data.images_of(rows), data.labels[rows]
    for part in torch.randperm(len(rows)).split(RECIPE["train_batch_size"]):
        x = images[part]
        x[::2] = x[::2].flip(3)
        left, top = torch.randint(9, (2,)).tolist()
        yield F.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32], labels[part]


def plain_epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """A training loop of torch alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    model.train()
    for x, y in batches:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def speed(path: str, images: int, rounds: int) -> None:
    """Print the milliseconds per image of each loop, and the ratios of times to salun's, one round after the other."""
    began = time.perf_counter()
    data = load_data(path)
    print(f"read in {time.perf_counter() - began:.1f} s: {tuple(data.images.shape)}; {torch.get_num_threads()} thread")
    options = resolve_options(
        UnlearnOptions(**{**RECIPE, "data": path, "epochs": 1, "lr": 0.01, "batch_size": 128}),
        data,
        make_split(data, 0.2, 0.1, 0),
    )
    data = replace(data, preset={**data.preset, "augment": "crop-flip"})
    split = make_split(data, 0.2, 0.1, 0).without_forget_set()
    rows = split.train[torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))[:images]]
    split, pictures = replace(split, retain=rows), Pictures(data, rows)

    def fresh() -> nn.Module:
        return new_model("resnet20", 3, 10, seed=0)

    def salun(dtype: torch.dtype) -> Callable[[], None]:
        model = fresh().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        task = Task(model, data, split, options, fresh, dtype=dtype)
        task.mask = Mask.full(task.parameters)
        return lambda: minimize(task, retain_batches(task), cross_entropy(task), batchnorm="updated")

    def plain(dtype: torch.dtype) -> Callable[[], None]:
        model = fresh()
        return lambda: plain_epoch(model, in_memory(data, rows), dtype)

    def by_picture(dtype: torch.dtype) -> Callable[[], None]:
        model = fresh()
        loader = DataLoader(pictures, RECIPE["train_batch_size"], shuffle=True)
        return lambda: plain_epoch(model, loader, dtype)

    loops: dict[str, Callable[[torch.dtype], Callable[[], None]]]
    loops = {"salun": salun, "tensors in memory": plain, "Pillow and DataLoader": by_picture}
    for dtype in (torch.float32, torch.bfloat16):
        runs = {name: make(dtype) for name, make in loops.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):  # the first is for warming up
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            pace = 1000 * statistics.median(values[1:]) / images
            ratios = [other / own for other, own in zip(values[1:], seconds["salun"][1:], strict=True)]
            shown_ratios = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(
                f"{str(dtype).removeprefix('torch.')}, {name}: {pace:.2f} ms per image; times salun's: {shown_ratios}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", required=True)
    training.add_argument("--out", type=Path, default=ROOT / "build" / "cifar10")
    training.add_argument("--seeds", type=int, nargs="+", default=[FIRST_SEED])
    training.add_argument("--forget", nargs="*", default=[])
    comparing = commands.add_parser("compare")
    comparing.add_argument("--data", required=True)
    comparing.add_argument("--out", type=Path, default=ROOT / "build" / "cifar10")
    comparing.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    comparing.add_argument("--seeds", type=int, default=3)
    comparing.add_argument("--methods", nargs="+", default=METHODS)
    comparing.add_argument("--workers", type=int)
    comparing.add_argument("--dry-run", action="store_true")
    commands.add_parser("page")
    measuring = commands.add_parser("speed")
    measuring.add_argument("--data", required=True)
    measuring.add_argument("--images", type=int, default=2560)
    measuring.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.command == "speed":
        speed(arguments.data, arguments.images, arguments.rounds)
    elif arguments.command == "compare":
        for forget in arguments.settings:
            options = comparison(arguments.data, forget, arguments.seeds, arguments.methods, arguments.workers)
            compare_methods(options, arguments.out, arguments.dry_run)
    elif arguments.command == "train":
        train_originals(arguments.data, arguments.out, arguments.seeds, arguments.forget)
    if arguments.command == "page" or (arguments.command == "compare" and not arguments.dry_run):
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
