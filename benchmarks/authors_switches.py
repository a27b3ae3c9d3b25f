"""What makes SalUn differ from the authors' code: their loop on salun's own draws, then one difference at a time.

    python -m benchmarks.authors_switches /path/to/Unlearn-Saliency/Classification --commit a6e89fd

`benchmarks/authors.py` compares the two codes with draws of their own. Here their loop gets the batches, random labels
and mask of a run of salun, so that nothing may differ; then one thing is changed at a time, and all else, the draws
too, stays as it was. The script writes the last section of docs/classification-authors.md after every seed.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import stdev
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.authors import APART, OPTIONS, RUNS, SWITCHES, TABLE, agreement, authors_code, first_part, quiet
from salun.classification.experiment import setup_of
from salun.classification.masks import BATCH, find_mask
from salun.classification.methods.relabeling import RelabelingOptions, random_labels, relabeled
from salun.classification.metrics import COMPARED, evaluate_classifier
from salun.classification.task import Batch, Task
from salun.classification.unlearn_options import UnlearnOptions
from salun.evaluation.interval import interval
from salun.masking.mask import Mask
from salun.masking.saliency import scores_from_losses
from salun.progress import Stage, silent
from salun.randomness import generator_of

READ = (  # revise after a change of either code
    "Read in both codes, and equal: −CE on D_f, BatchNorm in eval mode, signed gradients that are added "
    "before the absolute value, one threshold over all weights, int(density · N) of them; then SGD whose "
    "weight decay and momentum stay inside the mask, batches as means, no batch dropped, the forget set "
    "before the retain set in each epoch, labels from all classes drawn anew for each batch, a constant rate "
    "(theirs falls at epoch 91). Different: their mask adds the means of batches, so that a short last batch "
    "counts as a full one; ties at the threshold go to any weight there, here to the earlier one; a last "
    "single row joins the batch before it here, which does not occur below; and the generators of the draws."
)
CODE = types.SimpleNamespace()  # the authors' functions
SAME = RelabelingOptions(labels=OPTIONS["labels"], order=OPTIONS["order"])


class Replay:
    """A loader of the authors that gives the batches of one part that salun drew, an epoch at each pass."""

    dataset = ()

    def __init__(self, task: Task, epochs: list[list[Batch]], part: str) -> None:
        self.task, self.part, self.epochs = task, part, iter(epochs)

    def __len__(self) -> int:
        return 1  # used in their messages alone

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in next(self.epochs):
            if batch.part == self.part:
                yield self.task.data.images_of(batch.rows), batch.labels


@contextlib.contextmanager
def drawn(labels: list[Tensor]) -> Iterator[None]:
    """Their random labels, which they draw by torch.randint for each batch, are these."""
    real, rest = torch.randint, list(labels)
    torch.randint = lambda *a, **k: rest.pop(0)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randint = real
    assert not rest


def by_their_loop(mask: Callable[[Task], Mask], task: Task) -> None:
    """Their loop, with batches and labels as salun draws them for the task's seed."""
    options = task.options
    assert options.epochs is not None
    draw = relabeled(task, SAME)
    epochs = [list(draw(i, generator_of(options.seed, Stage.UNLEARNING, i))) for i in range(options.epochs)]
    chosen = mask(task)
    args = types.SimpleNamespace(
        unlearn_lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay,
        unlearn_epochs=options.epochs, decreasing_lr="91,136", rewind_epoch=0, imagenet_arch=False, warmup=0,
        print_freq=50, num_classes=task.classes, dataset="cifar10", unlearn="",
    )  # fmt: skip
    loaders = {part: Replay(task, epochs, part) for part in ("forget", "retain")}
    dense = {name: chosen.dense(name).float() for name in task.parameters}
    with quiet(), drawn([batch.labels for epoch in epochs for batch in epoch if batch.part == "forget"]):
        CODE.method("RL")(loaders, task.model, nn.CrossEntropyLoss(), args, dense)
    task.model.eval()


def by_salun(
    task: Task, mask: Callable[[Task], Mask], options: RelabelingOptions = SAME, batchnorm: str = "updated"
) -> None:
    """Salun's loop."""
    task.mask = mask(task)
    task.options = replace(task.options, batchnorm=batchnorm)
    random_labels(task, options)


def salun_mask(task: Task) -> Mask:
    """|Σ n_b ∇L_b|: batches weighted by their size, BatchNorm in eval mode."""
    return find_mask(task)[0]


def their_mask(task: Task) -> Mask:
    """Their mask, from their batches: |Σ ∇L_b|, where the short last batch counts as a full one."""
    rows = task.split.forget
    drawn_rows = rows[torch.randperm(len(rows), generator=generator_of(task.options.seed, "their batches"))]
    batches = [(task.data.images_of(part), task.labels(part)) for part in drawn_rows.split(task.size)]
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = types.SimpleNamespace(
            unlearn_lr=task.options.lr, momentum=task.options.momentum, weight_decay=task.options.weight_decay,
            save_dir=folder,
        )  # fmt: skip
        CODE.mask({"forget": batches}, task.model, nn.CrossEntropyLoss(), args)
        dense = torch.load(Path(folder) / "with_0.5.pt", weights_only=True)
    task.model.zero_grad()
    return Mask.from_scores({name: each.float() for name, each in dense.items()}, 0.5)


def mask_of_batch_statistics(task: Task) -> Mask:
    """Salun's mask, but with BatchNorm in train mode: it normalizes by each batch."""
    inner = replace(task, model=deepcopy(task.model))

    def losses() -> Iterator[tuple[Tensor, int]]:
        inner.model.train()
        for rows in task.split.forget.split(BATCH):
            loss = F.cross_entropy(inner.logits(task.data.images_of(rows)), task.labels(rows))
            yield -loss, len(rows)

    return Mask.from_scores(scores_from_losses(inner.parameters, losses()), task.options.density)


VARIANTS: dict[str, tuple[str, Callable[[Task], None]]] = {
    "salun": ("", partial(by_salun, mask=salun_mask)),
    "loop": ("their loop, salun's mask and draws", partial(by_their_loop, salun_mask)),
    "mask": ("their loop and their mask, salun's draws", partial(by_their_loop, their_mask)),
    "statistics": (
        "salun, the mask with BatchNorm normalizing by the batch", partial(by_salun, mask=mask_of_batch_statistics),
    ),
    "labels": ("salun, `--labels other`", partial(by_salun, mask=salun_mask, options=replace(SAME, labels="other"))),
    "order": ("salun, `--order mixed`", partial(by_salun, mask=salun_mask, options=replace(SAME, order="mixed"))),
    "batchnorm": ("salun, `--batchnorm frozen`", partial(by_salun, mask=salun_mask, batchnorm="frozen")),
    "draws": ("salun, other draws", partial(by_salun, mask=salun_mask)),
}  # fmt: skip


def of_seed(seed: int) -> dict[str, dict[str, Any]]:
    """Variant → its metrics, how far its weights are from salun's, and how far its mask agrees."""
    method, lr, epochs = RUNS["SalUn"]
    setting = setup_of(UnlearnOptions(method=method, lr=lr, epochs=epochs, seed=seed, **OPTIONS))
    original = setting.task(setting.original(silent), silent)
    rows: dict[str, dict[str, Any]] = {}
    weights: dict[str, Tensor] = {}
    for name, (_, run) in VARIANTS.items():
        draw = seed + APART if name == "draws" else seed
        options = replace(original.options, seed=draw)
        task = replace(original, model=deepcopy(original.model), options=options, history=[])
        run(task)
        trained = {key: value.detach().clone() for key, value in task.parameters.items()}
        weights = weights or trained
        task.options = original.options
        metrics = evaluate_classifier(task)
        rows[name] = {k: metrics[k]["value"] for k in COMPARED}
        rows[name]["apart"] = max(float((trained[k] - weights[k]).abs().max()) for k in weights)
    mask = salun_mask(replace(original, model=deepcopy(original.model)))
    for name, other in (("mask", their_mask), ("statistics", mask_of_batch_statistics)):
        found = other(replace(original, model=deepcopy(original.model)))
        rows[name]["agrees"] = agreement({n: found.dense(n) for n in original.parameters}, mask)
    return rows


def section(seeds: list[dict[str, dict[str, Any]]], commit: str) -> list[str]:
    """The section of the page: one row for each difference."""

    def cell(name: str, metric: str) -> str:
        of = interval([row[name][metric] - row["salun"][metric] for row in seeds])
        return f"{of['mean']:+.2f}" + ("" if of["low"] is None else f" ({of['low']:+.2f} to {of['high']:+.2f})")

    introduction = (
        f"Written by `benchmarks/authors_switches.py` against commit {commit}: SalUn as above, {len(seeds)} seeds, one "
        "draw each. Their loop gets the batches and the random labels that salun drew, and each row changes one thing; "
        "the draws stay, except where a row says so. Differences from salun in percentage points, paired by seed, with "
        "the 95 % interval by Student's t; and the largest difference of a weight."
    )
    out = [SWITCHES, "", fill(READ, 118), "", fill(introduction, 118), ""]
    out += ["| what differs | UA | RA | TA | MIA | weights | masks agree in |", "|---|---|---|---|---|---|---|"]
    for name, (title, _) in VARIANTS.items():
        if title:
            apart = max(row[name]["apart"] for row in seeds)
            agrees = [row[name]["agrees"] for row in seeds if "agrees" in row[name]]
            shown = f"{100 * sum(agrees) / len(agrees):.2f} %" if agrees else ""
            cells = " | ".join(cell(name, metric) for metric in COMPARED)
            out.append(f"| {title} | {cells} | {f'{apart:.2g}' if apart else '0'} | {shown} |")
    if len(seeds) > 1:
        spread = {k: stdev(row["draws"][k] - row["salun"][k] for row in seeds) / 2**0.5 for k in COMPARED}
        chance = {k: spread[k] * (2 / 20) ** 0.5 for k in COMPARED}
        listed = ", ".join(f"{k} {spread[k]:.2f}" for k in COMPARED)
        means = ", ".join(f"{k} {chance[k]:.2f}" for k in COMPARED)
        text = (
            f"From one draw to another of the same code a seed's metrics vary by a standard deviation of {listed}. So "
            f"the difference of two codes' means over 10 seeds and 2 draws, as in the table above, has a standard "
            f"deviation of {means} by the draws alone."
        )
        out += ["", fill(text, 118)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--commit", required=True, help="commit of the checkout, for the document")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    global CODE
    torch.set_num_threads(1)
    CODE = authors_code(arguments.checkout)
    seeds: list[dict[str, dict[str, Any]]] = []
    for seed in range(arguments.seeds):
        seeds.append(of_seed(seed))
        print(seed, seeds[-1], flush=True)
        text = "\n".join([first_part(TABLE.read_text(encoding="utf-8")), *section(seeds, arguments.commit), ""])
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
