"""Methods side by side on the bundled model: fills docs/comparison.md.

    python -m benchmarks.methods              run what is missing of the comparison, then write the page
    python -m benchmarks.methods --page       write the page of what is there, also while it runs

It is `salun compare --budget tuned`: each method takes as many passes as SalUn's steps, at the learning rate that does
best on training prompts of the first concept. The comparison is in build/methods, where an interrupted one continues;
each result is kept in `benchmarks/results/methods`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import salun
from salun.diffusion.compare import compare
from salun.diffusion.compare_jobs import Job, job_options, jobs_of, passes_of
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.compare_table import Result, cells_of, ranked, table_of
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import make_plan
from salun.runs.reading import read_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, BUILT = ROOT / "benchmarks/results/methods", ROOT / "docs/comparison.md", ROOT / "build/methods"
OPTIONS = CompareOptions(
    concept=["circle", "red", "night"],  # a shape, a color, a style
    methods=["salun", "uce", "finetune", "salun+scope=xattn-strict", "rece", "speed+speed_threshold=0.1", "esd", "ca",
             "erasediff", "leco", "ileco", "spm", "ant", "fmn"],
    seeds=1, budget="tuned", eval_images=100, device="cpu",
)  # fmt: skip
HEAD = """Written by `benchmarks/methods.py` on the bundled model `shapes`, on a CPU: `salun compare --budget tuned`,
concepts {concepts}, each with its preset anchor, {seeds}, {n} images of each kind. Each method that trains may take as
many passes through the network as 120 steps of SalUn, at the learning rate (UCE and RECE: the weight of the concept)
that did best on training prompts of {first}; see [methods.md](methods.md#comparing). UA: images of the concept's
prompts that do not show it. RA: attributes of images of other prompts that are as prompted. The difference is to SalUn,
on the same concepts and seeds, with its 95 % interval by Student's t. Seconds are those of this machine, next to other
programs, and samples that several methods share count for the first of them: compare passes instead."""


def collect(model: Model) -> list[Result]:
    """The results that are kept, with those of the comparison as far as it is."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = []
    for job in jobs_of(OPTIONS):
        path, run = RESULTS / f"{job.name}.json", BUILT / "jobs" / job.name
        if not path.exists() and (run / "run.json").is_file() and (record := read_run(run))["status"] == "done":
            path.write_text(json.dumps(_kept(model, job, record), indent=1) + "\n", encoding="utf-8")
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            results.append(Result(**kept["result"]))
    return results


def _kept(model: Model, job: Job, record: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a finished erasure: its result, and the options that the budget chose."""
    chosen = {name: record["options"].get(name) for name in ("lr", "steps", "batch_size", "uce_erase", "rece_erase")}
    plan = make_plan(model.settings, model.name, job.concept, job_options(model, OPTIONS, job, {}))
    result = Result.of(
        job.name, job.variant.name, job.concept, job.seed, record, plan.subjects[0].attribute, {}, passes_of(plan),
        sum(p.numel() for p in model.parameters().values()),
    )  # fmt: skip
    return {"result": asdict(result), "chosen": chosen, "n": record["options"]["eval_images"]}


def document(results: Sequence[Result]) -> str:
    """The whole page."""
    variants = [each for each in OPTIONS.variants if any(of.variant == each.name for of in results)]
    table = table_of(variants, results)
    seeds = sorted({each.seed for each in results})
    concepts = [f"*{name}*" for name in OPTIONS.concept]
    listed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    head = HEAD.format(concepts=", ".join(concepts), first=concepts[0], n=OPTIONS.eval_images, seeds=listed)
    missing = len(jobs_of(OPTIONS)) - len(results)
    parts = ["# Methods side by side", _filled(summary(table)), _filled(head)]
    if missing:
        parts.append(f"**Incomplete: {missing} of {len(jobs_of(OPTIONS))} erasures are missing.**")
    parts += ["## All concepts", _markdown(cells_of(table))]
    for concept in dict.fromkeys(each.concept for each in results):
        of = [each for each in results if each.concept == concept]
        there = [each for each in variants if any(result.variant == each.name for result in of)]
        parts += [f"## {concept}", _markdown(cells_of(table_of(there, of)))]
    parts += ["## What the search chose", _markdown(_chosen(variants))]
    return "\n\n".join(parts) + "\n"


def summary(table: Mapping[str, Any]) -> str:
    """What the numbers show, in sentences whose figures come from them."""
    rows = [row for row in ranked(table) if row["score"]]
    best, places = rows[0], [row["title"] for row in rows]
    said = f"**What it shows.** The highest mean of UA × RA has {best['title']} ({best['score']['mean']:.1f} %); "
    said += f"SalUn is number {places.index('SalUn') + 1} of {len(rows)} ({table['salun']['score']['mean']:.1f} %)."
    for word, sign in (("better", 1), ("worse", -1)):
        apart = [f"{row['title']} ({row['difference']['value']:+.1f})" for row in rows if row["difference"]
                 and row["difference"]["low"] is not None
                 and min(sign * row["difference"]["low"], sign * row["difference"]["high"]) > 0]  # fmt: skip
        said += f" Of the others, {', '.join(apart) if apart else 'none'} {'is' if len(apart) < 2 else 'are'} {word} "
        said += "than SalUn by an interval that leaves out 0." if sign > 0 else "by one."
    return said


def _chosen(variants: Sequence[Any]) -> list[list[str]]:
    """A method a row: the values that its erasures had, from the results that are kept."""
    rows = [["method", "learning rate", "weight of the concept", "steps", "samples a step"]]
    for variant in variants:
        kept = [json.loads(path.read_text(encoding="utf-8")) for job in jobs_of(OPTIONS)
                if job.variant.name == variant.name and (path := RESULTS / f"{job.name}.json").exists()]  # fmt: skip
        of = kept[0]["chosen"]
        weight = of["uce_erase"] if variant.method == "uce" else of["rece_erase"] if variant.method == "rece" else None
        values = (of["lr"], weight, of["steps"], of["batch_size"])
        rows.append([variant.name, *("–" if value is None else f"{value:.3g}" for value in values)])
    return rows


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    given = parser.parse_args()
    model = salun.load("shapes", device="cpu")
    assert isinstance(model, Model)
    if not given.page:
        compare(OPTIONS, model=model, run_dir=BUILT, resume=(BUILT / "run.json").is_file())
    PAGE.write_text(document(collect(model)), encoding="utf-8")


if __name__ == "__main__":
    main()
