"""What erasing does on the bundled model, against controls: fills docs/results.md.

    python benchmarks/erase.py                  run what is missing, then write the table
    python benchmarks/erase.py --only circle    some jobs only (a part of the job's name)
    python benchmarks/erase.py --table          write the table from what is there

Each job (concept, variant, seed) is one JSON file in benchmarks/results/, named by what it depends on: model, options,
number of images. The original model's images are cached in build/benchmarks/. Jobs that are done are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import salun
from salun.checkpoints.hashing import base_hash
from salun.diffusion.context import RunContext, training_session
from salun.diffusion.data.latents import decode_images
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.erase import unlearn
from salun.diffusion.evaluation import EvalPrompts, Evaluation, compare, eval_prompts, evaluate_model
from salun.diffusion.losses import ErasureData
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.evaluation.detector import Samples
from salun.evaluation.metric import Predictions
from salun.progress import Stage
from salun.runs.record import RunRecord

ROOT = Path(__file__).resolve().parents[1]
RESULTS, SAMPLED, TABLE = ROOT / "benchmarks" / "results", ROOT / "build" / "benchmarks", ROOT / "docs" / "results.md"
PARTS = ("forget", "retain", "anchor")  # of an evaluation
CONCEPTS = ("circle", "red", "night")  # a shape, a color, a style
SEEDS = (0, 1, 2)
EVAL_SEED = 101
VARIANTS: dict[str, dict[str, Any]] = {
    "SalUn": {},
    "SalUn-soft": {"method": "salun-soft"},
    "shuffled": {"mask": "shuffled"},
    "random": {"mask": "random"},
    "full": {"mask": "full"},
    "cross-attention only": {"scope": "xattn", "mask": "full"},
}
DENSITIES = (0.01, 0.1, 0.3, 0.5, 0.9)
SPARSE = (0.01, 0.1)  # at which masks differ
FURTHER: dict[str, dict[str, Any]] = {  # beyond the paper
    "gradient surgery": {"gradient_surgery": True},
    "little noise": {"forget_timesteps": "0-0.5"},
    "much noise": {"forget_timesteps": "0.5-1"},
}
DECISIVE = (
    "mask", "density", "method", "scope", "steps", "batch_size", "lr", "lr_decay", "retain_weight", "guidance",
    "target", "retain_target", "anchor_share", "forget_latents", "retain_latents", "seed",
)  # fmt: skip
LATER = ("gradient_surgery", "forget_timesteps")  # options that earlier results do not know


# its first paragraph is written by hand: revise it after a new run
PREAMBLE = """\
**What it shows.** At density 0.5 every variant erases: on average 95 % or more of the concept's images no longer show
it, and the accuracy on other prompts falls by at most 1.6 percentage points. **The saliency mask does not help
there**: half of the weights at random, all weights, or cross-attention alone give the same within the spread of three
seeds, and on *red* cross-attention alone is the most even. The mask helps where few weights may change: at density
0.01 UA is 35 % by saliency and 2 % at random, at 0.1 it is 97.5 and 94.0 %; from 0.3 on there is no difference.
Cross-attention alone moves other images of *circle* a little further (Fréchet distance 14.9, not 13.5). SalUn-soft
never found a sparse mask: its final density was 1 in every run.

Beyond the paper, on *red*: **gradient surgery changes nothing** (UA and RA within 0.2 points of SalUn's at the same
seeds, two of them). Forget timesteps from the half with little noise erase as those of the whole schedule do (one seed:
UA 99.6, RA drop 2.0, where SalUn has 100 and 1.8); from the half with much noise they erase nothing (UA 0.4). None of
them is a default.

Written by `benchmarks/erase.py`: {n} images each of forget and retain prompts per row and seed, from prompts that
training never used, at the same seeds before and after, on a CPU, after the recipe's fixed number of steps, 120 (the
default is a goal: [until.md](until.md)). Mean ± standard deviation over seeds; percent and
percentage points.

- UA: the detector does not see the concept (lowest UA: the lowest of the seeds).
- Anchor: it sees the anchor. Others kept: both other attributes are as in the prompt.
- None: the image is no longer valid.
- RA: fraction of correct attributes on other prompts.
- Fréchet: distance of detector features on retain images, between two halves of the original model's (base) and between
  the original and the erased model.

A row trains, for SalUn, the half of the weights with the largest saliency scores; shuffled: as many random weights in
each layer; random: half of the weights at random; full: all weights; cross-attention only: all weights of its layers;
gradient surgery: `--gradient-surgery`; little and much noise: `--forget-timesteps` 0-0.5 and 0.5-1.
"""


@dataclass(frozen=True)
class Job:
    """One erasure to measure."""

    concept: str
    variant: str
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.concept}-{self.variant}-{self.seed}".replace(" ", "_")


def jobs(extra: dict[str, Any]) -> list[Job]:
    """All jobs of the tables, the most important first."""
    result = [Job(c, "SalUn", s, extra) for s in SEEDS for c in CONCEPTS]
    for seed in SEEDS:
        result += [Job(c, v, seed, {**o, **extra}) for c in CONCEPTS for v, o in VARIANTS.items() if o]
        result += [
            Job("circle", f"{mask} {density}", seed, {"density": density, "mask": mask, **extra})
            for mask in ("saliency", "random")
            for density in DENSITIES
            if density != 0.5
        ]
    for seed in SEEDS:
        result += [Job("red", variant, seed, {**options, **extra}) for variant, options in FURTHER.items()]
        result += [
            Job("circle", f"{mask} {density}", seed, {"density": density, "mask": mask, **extra})
            for mask in ("saliency-by-layer", "saliency-ratio")
            for density in SPARSE
        ]
    return result


class Bench:
    """The model, what was sampled from it, and the results so far."""

    def __init__(self, n: int, tag: str) -> None:
        self.model: Model = salun.load("shapes", device="cpu")
        self.hash, self.n, self.tag = base_hash(self.model.original()), n, tag
        self.data: dict[tuple[Any, ...], ErasureData] = {}
        SAMPLED.mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(parents=True, exist_ok=True)

    def plan(self, job: Job) -> Plan:
        fixed = {"steps": self.model.settings.recipe.steps}  # in place of a goal
        options = EraseOptions(seed=job.seed, eval_images=0, **{**fixed, **job.options})  # evaluated separately
        return make_plan(self.model.settings, "shapes", salun.Concept(job.concept), options)

    def key(self, plan: Plan) -> str:
        """A hash of everything that a result depends on, except the code."""
        facts = {name: getattr(plan.options, name) for name in DECISIVE}
        facts |= {n: vars(plan.recipe).get(n) for n in DECISIVE if facts[n] is None}  # earlier results hold all numbers
        facts["mask"] = facts["mask"] or "saliency"  # as earlier results have it for SalUn-soft
        usual = EraseOptions()
        facts |= {name: value for name in LATER if (value := getattr(plan.options, name)) != getattr(usual, name)}
        facts |= {
            "base": self.hash,
            "n": self.n,
            "eval": EVAL_SEED,
            "saliency_timesteps": plan.recipe.saliency_timesteps,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]

    def path(self, job: Job, plan: Plan) -> Path:
        return RESULTS / f"{self.tag}{job.name}-{self.key(plan)}.json"

    def base(self, plan: Plan, prompts: EvalPrompts) -> Evaluation:
        """The original model's evaluation for a concept, sampled once."""
        path = SAMPLED / f"base-{plan.name}-{self.n}-{self.hash[:10]}.pt"
        if not path.exists():
            seen = evaluate_model(self.model, prompts, stage=Stage.IMAGES_BEFORE)
            parts = {name: samples.latents for name in PARTS if (samples := getattr(seen, name)) is not None}
            torch.save({**parts, "predictions": vars(seen.predictions)}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        stored = torch.load(path, weights_only=True)
        texts = {"forget": prompts.forget, "retain": prompts.retain, "anchor": prompts.anchors[0]}
        samples = {
            name: Samples(decode_images(self.model, stored[name]), stored[name], [p.text for p in texts[name]])
            for name in PARTS
            if name in stored
        }
        return Evaluation(**samples, predictions=Predictions(**stored["predictions"]))

    def run(self, job: Job) -> None:
        """Do a job, unless it is done."""
        plan = self.plan(job)
        path = self.path(job, plan)
        if path.exists():
            return
        prompts = eval_prompts(plan, self.n, EVAL_SEED)
        before = self.base(plan, prompts)
        key = (
            job.concept,
            job.seed,
            plan.recipe.forget_latents,
            plan.recipe.retain_latents,
            plan.recipe.anchor_share > 0,
        )
        if key not in self.data:
            self.data = {key: build_training_set(self.model, plan)}
        record = RunRecord(None, "benchmark", {}, job.seed, "cpu")
        with training_session(self.model, plan):
            run = unlearn(RunContext(self.model, plan, record), self.data[key])
            self.model.load(run.erased)
            after = evaluate_model(self.model, prompts)
            self.model.load(self.model.original())
            metrics = compare(self.model, plan, prompts, before, after)
        seconds = record.timings["saliency"] + record.timings["training"]
        result = {
            "concept": job.concept,
            "anchor": plan.concepts[0].anchor,
            "variant": job.variant,
            "seed": job.seed,
            "n": self.n,
            "seconds": round(seconds, 1),
            "mask": run.record.mask,
            "options": asdict(plan.options),
            "metrics": {k: v for k, v in metrics.items() if k != "per_class"},
            "worst_class": min(
                ((s["after"]["value"] - s["before"]["value"], name) for name, s in metrics["per_class"].items())
            ),
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(line(job.name, [result]), f"{seconds:.0f} s", flush=True)


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    """The columns of the table, in percent or percentage points."""
    m = result["metrics"]
    fall = {k: s["before"]["value"] - s["after"]["value"] for k, s in m["ra_by_attribute"].items()}
    return {
        "UA": m["ua"]["value"],
        "anchor": m["anchor"]["value"],
        "others kept": m["preserved"]["value"],
        "none": m["unclassified"]["value"],
        "RA before": m["ra_before"]["value"],
        "RA drop": m["ra_before"]["value"] - m["ra_after"]["value"],
        "largest drop of an attribute": max(fall.values()),
        "Fréchet (base)": m["frechet_before"]["value"] if m["frechet_before"] else nan,  # unknown of few images
        "Fréchet": m["frechet"]["value"] if m["frechet"] else nan,
    }


def line(name: str, results: list[dict[str, Any]]) -> str:
    """One row of the table: mean ± standard deviation over seeds."""
    cells = []
    for key in metrics_of(results[0]):
        values = [metrics_of(r)[key] for r in results]
        cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    lowest = min(metrics_of(r)["UA"] for r in results)
    return f"| {name} | {len(results)} | " + " | ".join(cells) + f" | {lowest:.1f} |"


def table(bench: Bench, wanted: list[Job]) -> str:
    """docs/results.md, from the results so far."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    missing = 0
    for job in wanted:
        path = bench.path(job, bench.plan(job))
        if not path.exists():
            missing += 1
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        density = job.variant.startswith(("saliency", "random")) and job.variant.split(" ")[-1][0].isdigit()
        title = f"{job.concept} → {result['anchor']}" + (", other densities" if density else "")
        groups.setdefault(title, {}).setdefault(job.variant, []).append(result)
    out = [
        "# Results on the bundled model",
        "",
        PREAMBLE.format(n=bench.n),
        "",
    ]
    if missing:
        out += [f"**Incomplete: {missing} of {len(wanted)} runs are missing.**", ""]
    for title, variants in groups.items():
        first = next(iter(variants.values()))[0]
        columns = list(metrics_of(first))
        out += [
            f"## {title}",
            "",
            "| variant | seeds | " + " | ".join(columns) + " | lowest UA |",
            "|---" * (len(columns) + 3) + "|",
        ]
        out += [line(name, results) for name, results in variants.items()]
        soft = [r["mask"]["density"] for r in variants.get("SalUn-soft", [])]
        out += ["", f"Final density of SalUn-soft: {', '.join(f'{d:.3f}' for d in soft)}.", ""] if soft else [""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="try other options; no table"
    )
    arguments = parser.parse_args()
    extra = {k: json.loads(v) if v[0] in "0123456789" else v for k, v in (s.split("=") for s in arguments.set)}
    bench = Bench(arguments.n, "try-" if extra or arguments.n != 1000 else "")
    wanted = jobs(extra)
    for job in wanted:
        if not arguments.table and arguments.only in job.name:
            bench.run(job)
    if not extra and arguments.n == 1000:
        TABLE.write_text(table(bench, wanted), encoding="utf-8")


if __name__ == "__main__":
    main()
