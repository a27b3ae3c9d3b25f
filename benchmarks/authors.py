"""The authors' code beside ours: FT, RL, GA and SalUn at equal hyperparameters, on the same models, rows and seeds.

    python benchmarks/authors.py /path/to/Unlearn-Saliency/Classification --commit a6e89fd

The path is a checkout of OPTML-Group/Unlearn-Saliency, of which nothing is kept here. What stands between: `.cuda()`
gives the tensor back as it is (they run on a CPU here), modules that only their data sets, models, plots and original
training need are empty, and their loaders get our rows and our small model. Their unlearning loops, their mask and
their evaluation run as they are. Ours is told to do as they do: random labels may be a picture's own (`labels any`),
the forget set comes first (`order forget-first`, theirs for CIFAR-10), and BatchNorm's statistics are updated. Writes
docs/classification-authors.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from salun.classification.experiment import forget, opened, setting_of
from salun.classification.masks import find_mask
from salun.classification.metrics import COMPARED, judge, members
from salun.classification.options import UnlearnOptions
from salun.classification.table import interval
from salun.classification.task import Task
from salun.mask import Mask
from salun.progress import silent

TABLE = Path(__file__).resolve().parents[1] / "docs" / "classification-authors.md"
RUNS = {"FT": ("ft", 0.02, 10), "RL": ("rl", 0.005, 10), "GA": ("ga", 0.0005, 5), "SalUn": ("salun", 0.01, 10)}
OPTIONS: dict[str, Any] = {"data": "clutter", "device": "cpu", "retrain": "no"}
OPTIONS |= {"labels": "any", "order": "forget-first", "batchnorm": "updated"}


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Our pictures as their loaders want them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def theirs_from(checkout: Path) -> types.SimpleNamespace:
    """Their modules, with what they need of a GPU, torchvision and matplotlib made harmless."""
    if not (checkout / "unlearn" / "impl.py").is_file():
        sys.exit(f"{checkout} holds no unlearn/impl.py: give the Classification folder of a checkout")

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    names = (
        "matplotlib",
        "matplotlib.pyplot",
        "torchvision",
        "torchvision.transforms",
        "dataset",
        "imagenet",
        "models",
    )
    for name in (*names, "arg_parser", "trainer.train"):
        sys.modules[name] = Empty(name)
        sys.modules[name].__path__ = []  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    sys.path.insert(0, str(checkout))
    import evaluation  # type: ignore[import-not-found]
    import generate_mask  # type: ignore[import-not-found]
    import trainer  # type: ignore[import-not-found]
    import unlearn  # type: ignore[import-not-found]

    return types.SimpleNamespace(
        mask=generate_mask.save_gradient_ratio, method=unlearn.get_unlearn_method, mia=evaluation.SVC_MIA,
        validate=trainer.validate,
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def theirs(
    code: types.SimpleNamespace, task: Task, name: str
) -> tuple[dict[str, Any], dict[str, float], float, list[float]]:
    """(our judgement of their model, theirs, seconds an epoch, shares of mask bits that ours has too: with their
    batches, which count alike however short the last is, and with one batch of all).
    """
    options = task.options
    assert options.epochs is not None
    loaders = {
        part: DataLoader(Rows(task.data.pictures(rows), task.labels(rows)), task.size, shuffle=part != "test")
        for part, rows in {"forget": task.split.forget, "retain": task.split.retain, "test": task.split.test}.items()
    }
    same: list[float] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = types.SimpleNamespace(
            unlearn_lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, save_dir=folder,
            unlearn_epochs=options.epochs, decreasing_lr="91,136", rewind_epoch=0, imagenet_arch=False, warmup=0,
            print_freq=50, no_l1_epochs=0, alpha=0.2, num_classes=task.classes, dataset="cifar10", unlearn="",
        )  # fmt: skip
        criterion, mask = nn.CrossEntropyLoss(), None
        if name == "SalUn":
            code.mask(loaders, task.model, criterion, args)
            mask = torch.load(Path(folder) / "with_0.5.pt", weights_only=True)
            ours, _ = find_mask(task)
            same = [agreement(mask, ours)]
            code.mask({"forget": DataLoader(loaders["forget"].dataset, 10**6)}, task.model, criterion, args)
            same.append(agreement(torch.load(Path(folder) / "with_0.5.pt", weights_only=True), ours))
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)
        began = time.perf_counter()
        code.method("RL" if name == "SalUn" else name)(loaders, task.model, criterion, args, mask)
        seconds = (time.perf_counter() - began) / options.epochs
        shadow = task.split.retain[members(len(task.split.retain), len(task.split.test), options.seed)]
        known = DataLoader(Rows(task.data.pictures(shadow), task.labels(shadow)), task.size)
        own = {
            "UA": 100 - float(code.validate(loaders["forget"], task.model, criterion, args)),
            "RA": float(code.validate(loaders["retain"], task.model, criterion, args)),
            "TA": float(code.validate(loaders["test"], task.model, criterion, args)),
        }
        attack = code.mia(known, None, loaders["forget"], loaders["test"], task.model)
        own["MIA"] = 100 * float(attack["confidence"])
    return judge(task), own, seconds, same


def agreement(theirs: dict[str, Tensor], ours: Mask) -> float:
    """The share of all entries that both masks have, or both have not."""
    same = sum(int((theirs[name].bool() == ours.dense(name)).sum()) for name in theirs)
    return same / ours.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--commit", required=True, help="of the checkout, for the page")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    code = theirs_from(arguments.checkout)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for seed in range(arguments.seeds):
        for name, (method, lr, epochs) in RUNS.items():
            setting = setting_of(UnlearnOptions(method=method, lr=lr, epochs=epochs, seed=seed, **OPTIONS))
            task = setting.task(setting.original(silent), silent)
            other = replace(task, model=deepcopy(task.model), history=[])
            began = time.perf_counter()
            forget(task, opened(setting))
            ours = (time.perf_counter() - began) / epochs
            found, own, seconds, same = theirs(code, other, name)
            rows[name].append(
                {
                    "ours": {k: v["value"] for k, v in judge(task).items() if k in COMPARED},
                    "theirs": {k: found[k]["value"] for k in COMPARED},
                    "their figures": own,
                    "seconds": (ours, seconds),
                    "same": same,
                }
            )
            print(seed, name, rows[name][-1], flush=True)
        TABLE.write_text(page(rows, arguments.commit, seed + 1), encoding="utf-8")


def page(rows: dict[str, list[dict[str, Any]]], commit: str, seeds: int) -> str:
    def cell(values: list[float]) -> str:
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    out = [
        "# Beside the authors' code",
        "",
        f"Written by `benchmarks/authors.py` against commit {commit} of OPTML-Group/Unlearn-Saliency: `clutter`,",
        f"random 10 %, {seeds} seeds, the same original, rows and hyperparameters on both sides, one thread of a CPU.",
        "Ours is told to do as theirs does: `--labels any --order forget-first --batchnorm updated`. Both models are",
        "judged by `salun`; their own evaluation of their models, its attack made from the members that ours draws,",
        "differs from that by the last column, at most.",
        "Batches and random labels are drawn by other generators on the two sides, so differences are judged by",
        "their intervals.",
        "",
        "| method | lr, epochs | | UA % | RA % | TA % | MIA % | s an epoch, least | judges differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, some in rows.items():
        _, lr, epochs = RUNS[name]
        for i, side in enumerate(("ours", "theirs")):
            cells = [cell([r[side][k] for r in some]) for k in COMPARED]
            seconds = f"{min(r['seconds'][i] for r in some):.3f}"
            worst = max(abs(r["theirs"][k] - r["their figures"][k]) for r in some for k in COMPARED)
            told = f"{worst:.2f}" if i else ""
            out.append(f"| {name} | {lr:g}, {epochs} | {side} | " + " | ".join([*cells, seconds, told]) + " |")
    out += [
        "",
        "Ours minus theirs, paired by seed, with the 95 % interval by Student's t, and the time as a ratio:",
        "",
    ]
    out += ["| method | UA | RA | TA | MIA | time, theirs / ours |", "|---|---|---|---|---|---|"]
    for name, some in rows.items():
        cells = []
        for k in COMPARED:
            found = interval([r["ours"][k] - r["theirs"][k] for r in some])
            low = "" if found["low"] is None else f" ({found['low']:+.2f} to {found['high']:+.2f})"
            cells.append(f"{found['mean']:+.2f}{low}")
        ratio = min(r["seconds"][1] for r in some) / min(r["seconds"][0] for r in some)
        out.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    first, second = (mean(r["same"][i] for r in rows["SalUn"]) for i in (0, 1))
    out += [
        "",
        f"At density 0.5 SalUn's two masks agree in {100 * first:.2f} % of the weights. Theirs adds up means of",
    ]
    out += [
        "batches, a short last one as much as a full one; ours weights batches by their size. With one batch of all"
    ]
    out += [f"of the forget set they agree in {100 * second:.2f} %.", ""]
    return "\n".join(out)


if __name__ == "__main__":
    main()
