"""Forgetting 2, 4 and 8 concepts in one run, with a joint mask or the union of masks: fills docs/concepts.md.

    python benchmarks/concepts.py            run what is missing, then write the table
    python benchmarks/concepts.py --table    write the table from what is there

Each run is one JSON file in benchmarks/results/concepts/, named by what it depends on. Runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import salun
from salun.diffusion.model.stable_diffusion import Model

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "concepts", ROOT / "docs" / "concepts.md"
CONCEPTS = ("circle", "red", "night", "star", "blue", "striped", "crescent", "pink")
IMAGES = 200  # of each concept's forget prompts, and as many of retain prompts
JOBS: list[dict[str, Any]] = [
    {"k": k, "combine": combine, "share": fraction, "seed": seed}
    for seed in (0, 1)
    for k in (2, 4, 8)
    for combine, fraction in (("joint", 1.0), ("union", 1.0), ("joint", 0.5))
]

# its first paragraph is written by hand: revise it after a new run
PREAMBLE = """\
**What it shows.** Several concepts can be erased in one run. With the recipe's steps for each of them, UA is 98 to
100 % on average and 96 % or more for the worst concept, and other prompts lose at most 0.7 percentage points. Half of
these steps leave the worst concept at 84 to 93 %. **The union of one mask for each concept does not help**: it does as
the joint mask does, and trains up to 81 % of the weights.

Written by `benchmarks/concepts.py`: the first 2, 4 and 8 of {names}, each with its preset anchor, in one run;
{n} images of each concept's held-out prompts and {n} of other prompts, on a CPU. UA and anchor: the mean over the
concepts, with the worst concept's value in brackets. RA: fraction of correct attributes on prompts without a concept.
Steps: the recipe's for one concept times the number of concepts, or half of that. Percent and percentage points; mean
over the seeds. Other jobs ran on the same machine, so that the seconds show the order of magnitude only.
"""


def path_of(model: Model, job: dict[str, Any]) -> Path:
    """The file of a job's result."""
    recipe = {name: getattr(model.settings.recipe, name) for name in ("steps", "batch_size", "lr", "forget_latents")}
    facts = json.dumps([job, CONCEPTS, IMAGES, model.base_hash, recipe], sort_keys=True)
    name = f"{job['k']}-{job['combine']}-{job['share']}-{job['seed']}"
    return RESULTS / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}.json"


def run(model: Model, job: dict[str, Any]) -> None:
    """Do a job, unless it is done."""
    path = path_of(model, job)
    if path.exists():
        return
    began = time.perf_counter()
    steps = round(model.settings.recipe.steps * job["k"] * job["share"])
    names = list(CONCEPTS[: job["k"]])
    done = salun.erase(model, names, combine=job["combine"], steps=steps, seed=job["seed"], eval_images=IMAGES)
    result = {
        **job,
        "steps": steps,
        "density": done.mask.density,
        "seconds": round(time.perf_counter() - began, 1),
        "timings": done.record.timings,
        "metrics": done.metrics,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(line([result]), f"{result['seconds']:.0f} s", flush=True)


def line(results: list[dict[str, Any]]) -> str:
    """One row of the table."""

    def each(key: str) -> str:
        percentages = [[c[key]["value"] for c in r["metrics"]["per_concept"].values()] for r in results]
        return f"{mean(mean(s) for s in percentages):.1f} ({mean(min(s) for s in percentages):.1f})"

    def over(of: Any) -> str:
        return f"{mean(of(r) for r in results):.1f}"

    first = results[0]
    cells = [str(first["k"]), first["combine"], str(first["steps"]), str(len(results))]
    cells += [over(lambda r: 100 * r["density"]), each("ua"), each("anchor")]
    cells += [
        over(lambda r: r["metrics"]["unclassified"]["value"]),
        over(lambda r: r["metrics"]["ra_before"]["value"]),
        over(lambda r: r["metrics"]["ra_before"]["value"] - r["metrics"]["ra_after"]["value"]),
        over(lambda r: r["timings"]["training"]),
    ]
    return "| " + " | ".join(cells) + " |"


def table(model: Model) -> str:
    """docs/concepts.md, from the results so far."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    missing = 0
    for job in JOBS:
        path = path_of(model, job)
        if not path.exists():
            missing += 1
            continue
        key = (job["k"], job["combine"], job["share"])
        groups.setdefault(key, []).append(json.loads(path.read_text(encoding="utf-8")))
    columns = "concepts | masks | steps | seeds | density | UA (worst) | anchor (worst) | none | RA before | RA drop"
    head = f"| {columns} | training, s |"
    out = ["# Several concepts at once, on the bundled model", ""]
    out += [PREAMBLE.format(names=", ".join(CONCEPTS), n=IMAGES)]
    out += [f"**Incomplete: {missing} of {len(JOBS)} runs are missing.**", ""] if missing else []
    out += [head, "|---" * head.count(" | ") + "|---|", *(line(groups[key]) for key in sorted(groups))]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    model = salun.load("shapes", device="cpu")
    for job in JOBS:
        if not arguments.table:
            run(model, job)
    TABLE.write_text(table(model), encoding="utf-8")


if __name__ == "__main__":
    main()
