"""The authors' code beside ours: FT, RL, GA and SalUn at equal hyperparameters, on the same models, rows and seeds.

    python benchmarks/authors.py /path/to/Unlearn-Saliency/Classification --commit a6e89fd

The path is a checkout of OPTML-Group/Unlearn-Saliency, of which nothing is kept here. What stands between: `.cuda()`
gives the tensor back as it is (they run on a CPU here), modules that only their data sets, models, plots and original
training need are empty, and their loaders get our rows and our small model. Their unlearning loops, their mask and
their evaluation run as they are. Ours is told to do as they do: random labels may be a picture's own (`labels any`),
the forget set comes first (`order forget-first`, theirs for CIFAR-10), and BatchNorm's statistics are updated.

One unlearning is one draw of batches and labels, and SalUn's figures move by points from draw to draw: so each seed's
original is unlearned several times on either side (`--draws`), and the means of these are paired. A row more gives
their loop our mask, to tell what the mask does from what the loop does. Writes docs/classification-authors.md after
every seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from salun.classification.experiment import ExperimentSetup, forget, open_record, setup_of
from salun.classification.masks import find_mask
from salun.classification.metrics import COMPARED, evaluate_classifier
from salun.classification.predictions import members
from salun.classification.table import interval
from salun.classification.task import Task
from salun.classification.unlearn_options import UnlearnOptions
from salun.masking.mask import Mask
from salun.progress import silent

TABLE = Path(__file__).resolve().parents[1] / "docs" / "classification-authors.md"
RUNS = {"FT": ("ft", 0.02, 10), "RL": ("rl", 0.005, 10), "GA": ("ga", 0.0005, 5), "SalUn": ("salun", 0.01, 10)}
SHARED = "SalUn, our mask"  # theirs with the mask that ours found
APART = 1000  # between the seeds of a seed's draws
CODE = types.SimpleNamespace()  # theirs, of a worker process
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
    code: types.SimpleNamespace, task: Task, name: str, seed: int
) -> tuple[dict[str, Any], dict[str, float], float, list[float]]:
    """(our judgement of their model, theirs, seconds an epoch, shares of mask bits that ours has too: with their
    batches, which count alike however short the last is, and with one batch of all). seed: of this draw; the attack's
    members are those of the task's own seed.
    """
    options = task.options
    assert options.epochs is not None
    loaders = {
        part: DataLoader(Rows(task.data.images_of(rows), task.labels(rows)), task.size, shuffle=part != "test")
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
        elif name == SHARED:
            ours, _ = find_mask(task)
            mask = {n: ours.dense(n).float() for n in task.parameters}
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        began = time.perf_counter()
        code.method("RL" if name in ("SalUn", SHARED) else name)(loaders, task.model, criterion, args, mask)
        seconds = (time.perf_counter() - began) / options.epochs
        shadow = task.split.retain[members(len(task.split.retain), len(task.split.test), options.seed)]
        known = DataLoader(Rows(task.data.images_of(shadow), task.labels(shadow)), task.size)
        own = {
            "UA": 100 - float(code.validate(loaders["forget"], task.model, criterion, args)),
            "RA": float(code.validate(loaders["retain"], task.model, criterion, args)),
            "TA": float(code.validate(loaders["test"], task.model, criterion, args)),
        }
        attack = code.mia(known, None, loaders["forget"], loaders["test"], task.model)
        own["MIA"] = 100 * float(attack["confidence"])
    return evaluate_classifier(task), own, seconds, same


def agreement(theirs: dict[str, Tensor], ours: Mask) -> float:
    """The share of all entries that both masks have, or both have not."""
    same = sum(int((theirs[name].bool() == ours.dense(name)).sum()) for name in theirs)
    return same / ours.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--commit", required=True, help="of the checkout, for the page")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3, help="unlearnings of each original on either side")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, one thread each")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*RUNS, SHARED)}
    processes = multiprocessing.get_context("spawn").Pool(arguments.workers, begin, (arguments.checkout,))
    with processes as pool:
        told = pool.imap(partial(of_seed, draws=arguments.draws), range(arguments.seeds))
        for seed, found in enumerate(told):
            for name, row in found.items():
                rows[name].append(row)
                print(seed, name, row, flush=True)
            TABLE.write_text(page(rows, arguments.commit, seed + 1, arguments.draws), encoding="utf-8")


def begin(checkout: Path) -> None:
    """Of a worker process."""
    global CODE
    torch.set_num_threads(1)
    CODE = theirs_from(checkout)


def of_seed(seed: int, draws: int) -> dict[str, dict[str, Any]]:
    """Row of the tables → what a seed's draws gave on either side."""
    rows = {}
    for name, (method, lr, epochs) in RUNS.items():
        setting = setup_of(UnlearnOptions(method=method, lr=lr, epochs=epochs, seed=seed, **OPTIONS))
        original = setting.task(setting.original(silent), silent)
        drawn = [seed + APART * draw for draw in range(draws)]
        mine = [ours_of(original, setting, own) for own in drawn]
        for told in (name, SHARED) if name == "SalUn" else (name,):
            found = [theirs(CODE, replace(original, model=deepcopy(original.model)), told, own) for own in drawn]
            rows[told] = {
                "ours": [{k: judged[k]["value"] for k in COMPARED} for judged, _ in mine],
                "theirs": [{k: judged[k]["value"] for k in COMPARED} for judged, *_ in found],
                "their figures": [own for _, own, *_ in found],
                "seconds": (min(s for _, s in mine), min(s for _, _, s, _ in found)),
                "same": [mean(shares) for shares in zip(*(same for *_, same in found), strict=True)],
            }
    return rows


def ours_of(original: Task, setting: ExperimentSetup, seed: int) -> tuple[dict[str, Any], float]:
    """(the judgement of our model, seconds an epoch) of one draw; judged by the original's own seed."""
    task = replace(original, model=deepcopy(original.model), options=replace(original.options, seed=seed), history=[])
    assert task.options.epochs is not None
    began = time.perf_counter()
    forget(task, open_record(setting))
    seconds = (time.perf_counter() - began) / task.options.epochs
    task.options = original.options
    return evaluate_classifier(task), seconds


def differences(some: list[dict[str, Any]], figure: str, draws: int) -> dict[str, Any]:
    """Ours minus theirs of the first `draws` draws' means, paired by seed, see `interval`."""
    sides = ([mean(d[figure] for d in row[side][:draws]) for row in some] for side in ("ours", "theirs"))
    return interval([mine - other for mine, other in zip(*sides, strict=True)])


def apart(rows: dict[str, list[dict[str, Any]]], draws: int) -> str:
    """The intervals that exclude zero, named; "none" where there is none."""
    found = [
        f"{name} {k} {told['mean']:+.2f} ({told['low']:+.2f} to {told['high']:+.2f})"
        for name, some in rows.items()
        for k in COMPARED
        if (told := differences(some, k, draws))["low"] is not None and (told["low"] > 0 or told["high"] < 0)
    ]
    return "; ".join(found) or "none"


def page(rows: dict[str, list[dict[str, Any]]], commit: str, seeds: int, draws: int) -> str:
    def cell(values: list[float]) -> str:
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    told = [
        f"Written by `benchmarks/authors.py` against commit {commit} of OPTML-Group/Unlearn-Saliency: `clutter`, "
        f"random 10 %, {seeds} seeds, the same original, rows and hyperparameters on both sides, one thread of a CPU. "
        "Ours is told to do as theirs does: `--labels any --order forget-first --batchnorm updated`. Both models are "
        "judged by `salun`; their own evaluation of their models, its attack made from the members that ours draws, "
        "differs from that by the last column, at most.",
        "Batches and random labels are drawn by other generators on the two sides, and one unlearning is one draw of "
        f"them: each original is unlearned {draws} times on either side, and the means of these count as the seed's "
        "figures. *SalUn, our mask* is their loop with the mask that ours found, beside ours as in the row above.",
    ]
    out = ["# Beside the authors' code", ""]
    for paragraph in told:
        out += [fill(paragraph, 118), ""]
    out += [
        "| method | lr, epochs | | UA % | RA % | TA % | MIA % | s an epoch, least | judges differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, some in rows.items():
        _, lr, epochs = RUNS["SalUn" if name == SHARED else name]
        for i, side in enumerate(("ours", "theirs")):
            if name == SHARED and side == "ours":
                continue
            cells = [cell([mean(d[k] for d in r[side]) for r in some]) for k in COMPARED]
            seconds = f"{min(r['seconds'][i] for r in some):.3f}"
            pairs = [pair for r in some for pair in zip(r["theirs"], r["their figures"], strict=True)]
            worst = max(abs(ours[k] - own[k]) for ours, own in pairs for k in COMPARED)
            out.append(
                f"| {name} | {lr:g}, {epochs} | {side} | "
                + " | ".join([*cells, seconds, f"{worst:.2f}" if i else ""])
                + " |"
            )
    out += [
        "",
        "Ours minus theirs, paired by seed, with the 95 % interval by Student's t, and the time as a ratio:",
        "",
    ]
    out += ["| method | UA | RA | TA | MIA | time, theirs / ours |", "|---|---|---|---|---|---|"]
    for name, some in rows.items():
        cells = []
        for k in COMPARED:
            found = differences(some, k, draws)
            low = "" if found["low"] is None else f" ({found['low']:+.2f} to {found['high']:+.2f})"
            cells.append(f"{found['mean']:+.2f}{low}")
        ratio = min(r["seconds"][1] for r in some) / min(r["seconds"][0] for r in some)
        out.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    count = len(rows) * len(COMPARED)
    end = f"Of these {count} intervals, not corrected for their number, those that exclude zero: {apart(rows, draws)}."
    if draws > 1:
        end += f" By the first draw of each seed alone they would be: {apart(rows, 1)}."
    first, second = (mean(r["same"][i] for r in rows["SalUn"]) for i in (0, 1))
    masks = (
        f"At density 0.5 SalUn's two masks agree in {100 * first:.2f} % of the weights. Theirs adds up means of "
        "batches, a short last one as much as a full one; ours weights batches by their size. With one batch of all of "
        f"the forget set they agree in {100 * second:.2f} %."
    )
    return "\n".join([*out, "", fill(end, 118), "", fill(masks, 118), ""])


if __name__ == "__main__":
    main()
