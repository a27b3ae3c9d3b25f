"""The comparison of unlearning methods that fills docs/classification-results.md.

    python benchmarks/classify.py                  # run the missing comparisons, then write the document
    python benchmarks/classify.py --only clutter   # run only comparisons with "clutter" in their name
    python benchmarks/classify.py --table          # write the document from the finished comparisons
    python benchmarks/classify.py --rates          # print the values that the searches chose

Every setting is one `salun classify-compare` in benchmarks/results/classify/. It can be interrupted at any time; the
next start resumes with the jobs that are left. The defaults in `methods/__init__.py` are the values that the search
chose in the first setting, without Retrain. The grids of the runs have other centers, the defaults of that time
(CENTERS), so that a repeated run tries the same values.
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
FURTHER = ["salun", "lfssd", "bad-teacher", "jit", "delete", "neggrad-plus", "unsir"]  # next to SalUn
FORGET = {"random:0.1": "random 10 %", "class:3": "one class", "random:0.5": "random 50 %"}
ORDER = {"digits": "forget-first", "clutter": "mixed"}  # as in the authors' code on CIFAR-10 and on CIFAR-100
CENTERS = {  # of the grids of the runs: the methods' default learning rates at that time
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


REMARKS = {  # of searches in the stored runs → as salun writes them now
    "no nearer than the untouched model": "no nearer than the original model",
    "comes apart next to it": "a neighboring value diverges",
    "no value gives a model": "every value diverges",
}


def settings() -> dict[str, CompareOptions]:
    """Name → the options of its comparison."""
    common: dict[str, Any] = {"methods": METHODS, "device": "cpu", "seeds": 10}
    comparisons = {}
    for forget in FORGET:
        for data in ("clutter", "digits"):
            common["search_seeds"] = 2 if (data, forget) == ("clutter", "random:0.1") else 1  # the hardest setting
            comparisons[f"{data} {forget}"] = CompareOptions(data=data, forget=forget, order=ORDER[data], **common)
    for data, forget in (("clutter", "random:0.1"), ("clutter", "class:3"), ("digits", "class:3")):
        methods = FURTHER if forget.startswith("class") else FURTHER[:-1]  # UNSIR forgets whole classes
        seeds = {"seeds": 5, "search_seeds": 2 if forget == "random:0.1" else 1, "order": ORDER[data]}
        comparisons[f"{data} {forget} further"] = CompareOptions(
            data=data, forget=forget, **{**common, **seeds, "methods": methods}
        )
    density = {**common, "methods": DENSITIES, "seeds": 5, "search_seeds": 1, "relearn": 100, "order": ORDER["clutter"]}
    comparisons["clutter density"] = CompareOptions(data="clutter", **density)
    return comparisons


def folder_of(name: str) -> Path:
    return RESULTS / name.replace(" ", "-").replace(":", "-")


@contextmanager
def grids_of_the_runs() -> Iterator[None]:
    """Within, searches begin with grids around CENTERS. (Worker processes get the values, not the grid.)"""
    registry = salun.methods.METHODS["classification"]
    unchanged = dict(registry)
    registry.update(
        {
            name: replace(unchanged[name], defaults={**unchanged[name].defaults, "lr": lr})
            for name, lr in CENTERS.items()
        }
    )
    try:
        yield
    finally:
        registry.update(unchanged)


def run(name: str, options: CompareOptions, workers: int) -> None:
    """Run one comparison. Its folder keeps run.json and the report, without paths of this machine."""

    def show(event: Event, /) -> None:
        if event.message:
            print(f"{name} {event.step}/{event.total}: {event.message}", flush=True)

    folder = folder_of(name)
    if (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())["status"] == "done":
        return
    options, command = replace(options, workers=workers), f"classify.py: {name}"
    with grids_of_the_runs():
        compare(options, run_dir=folder, resume=True, progress=show, command=command)
    for path in (folder / "jobs", folder / "log.txt", folder / ".lock", folder / "state"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def rates() -> None:
    """Print the value that the search chose for each method in each finished setting."""
    for name in settings():
        path = folder_of(name) / "run.json"
        if path.is_file():
            for method, row in json.loads(path.read_text(encoding="utf-8"))["metrics"]["methods"].items():
                result = row["search"]
                print(f"{name}, {method}: {result['option']} {result['chosen']} ({result['remark'] or 'no remark'})")


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def table() -> str:
    out = ["# Unlearning in classifiers: results", ""]
    for paragraph in PREAMBLE:
        out += [fill(paragraph, 118), ""]
    verdicts, parts = [], []
    for name, given in settings().items():
        path = folder_of(name) / "run.json"
        if not path.is_file() or json.loads(path.read_text())["status"] != "done":
            parts += [f"## {name}", "", "Not run yet.", ""]
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics = renamed(record["metrics"])
        ending = ": density" if "density" in name else ": further methods" if "further" in name else ""
        forget = given.forget or record["options"]["forget"]  # as asked for: the record has a class by its name
        title = f"{given.data}, {FORGET[forget]}{ending}"
        parts += [f"## {title}", "", *markdown(lines_of(metrics)), ""]
        for heading, rows in list(tables_of(metrics).items())[1:]:
            if len(rows) > 1:
                parts += [f"<details><summary>{heading}</summary>", "", *markdown(rows), "", "</details>", ""]
        parts += failures(metrics)
        if "density" not in name:
            verdicts.append(verdict(title, metrics))
    return "\n".join([*out, "## Summary", "", *verdicts, "", *parts])


def renamed(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run, with the remarks of its searches in today's terms."""
    for row in metrics["methods"].values():
        for old, new in REMARKS.items():
            if row["search"] and row["search"]["remark"]:
                row["search"]["remark"] = row["search"]["remark"].replace(old, new)
    return metrics


def failures(metrics: dict[str, Any]) -> list[str]:
    """A line for each method that failed at some seeds: the seeds, and the reason at the first."""
    failed = [row for row in metrics["methods"].values() if row["failed"]]
    lines = [f"- {row['title']} failed at seeds {', '.join(map(str, row['failed']))}: {row['why']}" for row in failed]
    return [*lines, ""] if lines else []


def verdict(title: str, metrics: dict[str, Any]) -> str:
    """The rank of SalUn by the mean gap among the approximate methods, without the controls and without methods on
    which the search found no effect: their rank would be the original's.
    """
    chance, original = (metrics[side]["gap_mean"]["mean"] for side in ("again", "original"))
    rows = metrics["methods"]
    titles = {name: row["title"] for name, row in rows.items()}
    known = {n: r["gap_mean"]["mean"] for n, r in rows.items() if n in {*METHODS, *FURTHER} and r["gap_mean"]["n"]}
    idle = [name for name in known if is_no_better_than_original(rows[name]["search"])]
    order = sorted((name for name in known if name not in idle), key=lambda name: known[name])
    nearest = ", ".join(f"{titles[n]} {known[n]:.2f}" for n in order[:5]) or "none"
    scale = f"The gap by chance is {chance:.2f}, the original's gap {original:.2f}"
    if original < 1:  # percentage points
        scale += ", so that there is hardly anything to forget and methods cannot be distinguished"
    idlers = f"Not ranked, since the search found no effect: {', '.join(titles[n] for n in idle)}. " if idle else ""
    if "salun" not in order:
        why = "at its best value it is no nearer to the predicted metrics than the original"
        where = why if "salun" in idle else "it failed at every seed"
        return f"- *{title}*: SalUn is not ranked: {where}. {idlers}Nearest of the others: {nearest}. {scale}."
    ends = {
        name: difference
        for name, difference in metrics["differences"]["of"].items()
        if name in order and difference["bootstrap"] is not None
    }
    better = [n for n in order if n in ends and max(ends[n]["high"], ends[n]["bootstrap"][1]) < 0]
    worse = [n for n in order if n in ends and min(ends[n]["low"], ends[n]["bootstrap"][0]) > 0]
    beaten = f"significantly nearer than SalUn: {', '.join(titles[n] for n in better) or 'none'}"
    beats = f"significantly farther: {', '.join(titles[n] for n in worse) or 'none'}"
    where = f"- *{title}*: SalUn ({known['salun']:.2f}) ranks {order.index('salun') + 1} of {len(order)}."
    significant = f"By both paired intervals of {len(ends)} comparisons, uncorrected, {beaten}; {beats}."
    return f"{where} Nearest: {nearest}. {idlers}{scale}. {significant}"


PREAMBLE = (  # its first paragraph is written by hand: revise it after a new run
    "**What it shows.** On `clutter` SalUn is the nearest to retraining for a random 10 % (mean gap 6.4 "
    "percentage points; 1.5 is chance), and second for one class and for a random 50 %. In no setting of the "
    "first twelve methods where SalUn is ranked is another significantly nearer, but none comes near chance for "
    "random subsets. Of the further methods, over five seeds, LFSSD is significantly nearer for one class (0.57, "
    "SalUn 1.17), and has no effect on a random 10 %, where NegGrad+ is as near as SalUn (5.3 and 5.6). **The "
    "choice of the weights helps little**: RL, which is SalUn with all weights, is not significantly farther for "
    "a random 10 %, though it is for one class and for 50 %; over five seeds a mask that is shuffled within the "
    "layers does as well (5.9, SalUn 6.2), a random one does worse at density 0.5 (7.8) and 0.3 (6.3, SalUn 4.7) "
    "and better at 0.1 (5.7, SalUn 8.6). On the digits a random subset leaves almost nothing to forget, and SalUn "
    "has no effect there.",
    "Written by `benchmarks/classify.py`: 10 seeds (5 for densities and further methods) on a CPU, one thread. Each "
    "seed has its own original, forget set and Retrain. Cells are mean ± standard deviation over seeds; in "
    "parentheses is the difference of the mean from Retrain's mean over the same seeds, and *avg. gap* is the average "
    "of these, as in the SalUn paper. *Gap by seed* is the mean over UA, RA, TA and MIA of each seed's gap to its own "
    "Retrain, in which errors of different seeds do not cancel; methods are compared by it. *Retrain, another seed* "
    "is trained on the same rows from other first weights; it is exact as well, so its gap is chance. The row "
    "*original* has the gap of the model before unlearning. *RTE* is the median of the seconds of one unlearning. "
    "*Search* is the seconds of the search for the learning rate, made once, on one seed (on two in the first "
    "setting, the hardest), without Retrain. For the terms see [classification.md](classification.md).",
    "**Limits of these results.** The data sets are small, and the only model has 28,000 weights. *Significantly* "
    "means that neither of a method's two 95 % intervals contains 0; a setting has up to 11 such comparisons, not "
    "corrected for their number, so that a method may be in a list by chance. The search evaluates on about 150 "
    "validation images of two seeds at most; the column *remark* names reasons to doubt a value. A method whose "
    "value is *no nearer than the original model* has no effect at best by the criterion of the search; it is not "
    "ranked, and is listed as such. The first grid of a search lay around the methods' default learning rates of "
    "that time, which `benchmarks/classify.py` keeps; the defaults of today are the values that the search of the "
    "first setting chose. Batches are mixed on clutter and forget-first on digits, which affects only SalUn, "
    "SalUn-soft and RL. A method that failed at some seeds is averaged over the others, without its worst seeds: "
    "such failures are listed below the tables. Seconds are from a machine with other load.",
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
