"""The comparison of unlearning methods that fills docs/classification-results.md.

    python benchmarks/classify.py                  # what is missing of the runs, then the table
    python benchmarks/classify.py --only clutter   # those with "clutter" in their name
    python benchmarks/classify.py --table          # the table from what there is
    python benchmarks/classify.py --rates          # what the searches found

Every setting is one `salun classify-compare` in benchmarks/results/classify/; it is resumable: kill it and start it
again. Jobs that are done are not made anew. The defaults in `methods/__init__.py` are what the search found in the
first setting: they come of its criterion, which does not look at Retrain. The grids themselves lay around older
defaults, which are kept here (CENTRES), so that the very same values are tried again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

import salun.methods
from salun.classification.compare import compare
from salun.classification.search import is_no_better_than_original
from salun.classification.table import lines_of, tables_of
from salun.classification.unlearn_options import CompareOptions
from salun.progress import Event

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "classify"
TABLE = ROOT / "docs" / "classification-results.md"
METHODS = ["salun", "salun-soft", "rl", "ft", "ga", "l1-sparse", "scrub", "ssd", "iu", "ff", "be", "bs"]
FORGET = {"random:0.1": "random 10 %", "class:3": "one class", "random:0.5": "random 50 %"}
ORDER = {"digits": "forget-first", "clutter": "mixed"}  # as in the authors' code on CIFAR-10 and on CIFAR-100
CENTRES = {  # of the grids that the runs were searched by: the methods' default rates before there were these runs
    "salun": 0.003, "salun-soft": 0.003, "rl": 0.003, "ft": 0.01, "ga": 0.01, "l1-sparse": 0.01, "scrub": 0.01,
    "be": 1e-4, "bs": 5e-5,
}  # fmt: skip
DENSITIES = ["salun@0.1", "salun@0.3", "salun", "salun@0.7", "salun@0.9"]
DENSITIES += [
    "salun/shuffled",
    "salun/random@0.1",
    "salun/random@0.3",
    "salun/random",
    "salun/random@0.7",
    "salun/random@0.9",
]


def settings() -> dict[str, CompareOptions]:
    """Name → what is compared."""
    common: dict[str, Any] = {"methods": METHODS, "device": "cpu", "seeds": 10}
    found = {}
    for forget in FORGET:
        for data in ("clutter", "digits"):
            common["search_seeds"] = 2 if (data, forget) == ("clutter", "random:0.1") else 1  # the hardest setting
            found[f"{data} {forget}"] = CompareOptions(data=data, forget=forget, order=ORDER[data], **common)
    told = {**common, "methods": DENSITIES, "seeds": 5, "search_seeds": 1, "relearn": 100, "order": ORDER["clutter"]}
    found["clutter density"] = CompareOptions(data="clutter", **told)
    return found


def folder_of(name: str) -> Path:
    return RESULTS / name.replace(" ", "-").replace(":", "-")


@contextmanager
def grids_of_the_runs() -> Iterator[None]:
    """Within, a search begins with the grids around CENTRES. (Worker processes are told the values, not the grid.)"""
    registry = salun.methods.METHODS["classification"]
    kept = dict(registry)
    registry.update(
        {name: replace(kept[name], defaults={**kept[name].defaults, "lr": lr}) for name, lr in CENTRES.items()}
    )
    try:
        yield
    finally:
        registry.update(kept)


def run(name: str, options: CompareOptions, workers: int) -> None:
    """One comparison; its folder keeps the results and the report, with seconds but no paths of the machine."""

    def show(event: Event, /) -> None:
        if event.message:
            print(f"{name} {event.step}/{event.total}: {event.message}", flush=True)

    folder = folder_of(name)
    if (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())["status"] == "done":
        return
    own, command = replace(options, workers=workers), f"classify.py: {name}"
    with grids_of_the_runs():
        compare(own, run_dir=folder, resume=True, progress=show, command=command)
    for path in (folder / "jobs", folder / "log.txt", folder / ".lock", folder / "state"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def rates() -> None:
    """The value that the search found for each method in each setting there is."""
    for name in settings():
        path = folder_of(name) / "run.json"
        if path.is_file():
            for method, row in json.loads(path.read_text(encoding="utf-8"))["metrics"]["methods"].items():
                told = row["search"]
                print(f"{name}, {method}: {told['option']} {told['chosen']} ({told['remark'] or 'nothing against it'})")


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def table() -> str:
    out = ["# Unlearning in classifiers: results", ""]
    for paragraph in PREAMBLE:
        out += [fill(paragraph, 118), ""]
    verdicts, parts = [], []
    for name in settings():
        path = folder_of(name) / "run.json"
        if not path.is_file() or json.loads(path.read_text())["status"] != "done":
            parts += [f"## {name}", "", "Not made yet.", ""]
            continue
        told = json.loads(path.read_text(encoding="utf-8"))
        metrics, options = told["metrics"], told["options"]
        title = f"{options['data']}, {FORGET[options['forget']]}" + (": density" if "density" in name else "")
        parts += [f"## {title}", "", *markdown(lines_of(metrics)), ""]
        for heading, rows in list(tables_of(metrics).items())[1:]:
            if len(rows) > 1:
                parts += [f"<details><summary>{heading}</summary>", "", *markdown(rows), "", "</details>", ""]
        parts += failures(metrics)
        if "density" not in name:
            verdicts.append(verdict(title, metrics))
    return "\n".join([*out, "## In short", "", *verdicts, "", *parts])


def failures(metrics: dict[str, Any]) -> list[str]:
    """A line for each method that failed at some seeds: at which, and why at the first of them."""
    some = [row for row in metrics["methods"].values() if row["failed"]]
    lines = [f"- {row['title']} failed at seeds {', '.join(map(str, row['failed']))}: {row['why']}" for row in some]
    return [*lines, ""] if lines else []


def verdict(title: str, metrics: dict[str, Any]) -> str:
    """Where SalUn stands among the approximate methods by the gap of each seed, the controls left out, and those that
    did nothing, by the search: a place of theirs would be the original's.
    """
    chance, untouched = (metrics[side]["gap_mean"]["mean"] for side in ("again", "original"))
    rows = metrics["methods"]
    titles = {name: row["title"] for name, row in rows.items()}
    known = {n: r["gap_mean"]["mean"] for n, r in rows.items() if n in METHODS and r["gap_mean"]["n"]}
    idle = [name for name in known if is_no_better_than_original(rows[name]["search"])]
    order = sorted((name for name in known if name not in idle), key=lambda name: known[name])
    nearest = ", ".join(f"{titles[n]} {known[n]:.2f}" for n in order[:5]) or "none"
    scale = f"Chance is {chance:.2f}, the original {untouched:.2f}"
    if untouched < 1:  # points
        scale += ", so that there is next to nothing to forget, and nothing by which to tell methods apart"
    idlers = f"Did nothing, by the search: {', '.join(titles[n] for n in idle)}. " if idle else ""
    if "salun" not in order:
        why = "did nothing, by the search: at its best value it is no nearer to what is foretold than the original"
        where = why if "salun" in idle else "gave no model"
        return f"- *{title}*: SalUn {where}; it has no place here. {idlers}Nearest of the others: {nearest}. {scale}."
    ends = {
        name: found
        for name, found in metrics["differences"]["of"].items()
        if name in order and found["bootstrap"] is not None
    }
    better = [n for n in order if n in ends and max(ends[n]["high"], ends[n]["bootstrap"][1]) < 0]
    worse = [n for n in order if n in ends and min(ends[n]["low"], ends[n]["bootstrap"][0]) > 0]
    beaten = f"surely nearer than SalUn: {', '.join(titles[n] for n in better) or 'none'}"
    beats = f"surely farther: {', '.join(titles[n] for n in worse) or 'none'}"
    where = f"- *{title}*: SalUn ({known['salun']:.2f}) is number {order.index('salun') + 1} of {len(order)}."
    told = f"By both paired intervals of {len(ends)} comparisons, uncorrected, {beaten}; {beats}."
    return f"{where} Nearest: {nearest}. {idlers}{scale}. {told}"


PREAMBLE = (
    "Written by `benchmarks/classify.py`: 10 seeds (5 for the densities), each with its own original, forget set "
    "and Retrain, on a CPU, one "
    "thread. Mean ± standard deviation over seeds; in parentheses the distance of the mean from Retrain's mean over "
    "the same seeds, and their average, as in the SalUn paper. *Gap by seed*: the mean over UA, RA, TA and MIA of "
    "each seed's own gap to its own Retrain, in which errors of different seeds do not cancel; this is what is "
    "compared, and its median stands beside it. *Retrain, another seed* is trained on the same rows from other first "
    "weights: it is exact as well, so its gap is chance. *original*: the gap of having done nothing. RTE: seconds of "
    "one unlearning, the median; *search*: seconds that the search for the rate took, once for all, on one seed (on "
    "two in the first setting, the hardest). It never looks at Retrain. What the words mean: "
    "[classification.md](classification.md).",
    "**To be held against these figures.** Two small sets and one model of 28,000 weights. *Surely* means that neither "
    "of a method's two 95 % intervals has 0 in it; a setting has up to 11 such comparisons, not corrected for their "
    "number, so that such a list may name a method by chance. The search judges by some 150 validation pictures of two "
    "seeds at most; what is to be held against each value stands beside it: a method whose value is *no nearer than "
    "the untouched model* is at its best doing nothing, by that criterion: it has no place, and is named as having "
    "done nothing. The first grid of a search lay around the methods' default rates of that time, which "
    "`benchmarks/classify.py` keeps; the defaults of today are what the first setting's search found. Batches are "
    "mixed on the clutter and forget-first on the digits, which matters to SalUn, SalUn-soft and RL alone. "
    "A method that failed at some seeds is averaged over the others, so that its worst seeds do not count: see who "
    "failed. Seconds are of a machine that others used at the same time.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rates:
        rates()
        return
    for name, options in settings().items():
        if not arguments.table and arguments.only in name:
            run(name, options, arguments.workers)
    TABLE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
