"""Erasing towards the default goal (`--until`), beside the fixed recipe, on cases that nobody tuned for.

    python -m benchmarks.until [--n 1000] [--seeds 0 1 2] [--cases circle red night ...] [--how goal fixed]

Each case is erased without options, and with the fixed number of steps; the cache of samples is empty for both.
Prints, and writes to `docs/until.md` after each run, what `run.json` says and the processor's time without the final
evaluation, so that a busy machine counts little. Results are kept in `benchmarks/results/until`: an interrupted run
continues, and the table has all that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

import salun
from benchmarks.stored import stored
from salun.diffusion.evaluation import compare, eval_prompts, evaluate_model
from salun.diffusion.goal import Goal
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.result import Run
from salun.errors import SalunError
from salun.evaluation.estimate import from_json
from salun.progress import Event, Stage
from salun.runs.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
BUNDLED, HOW = ("shapes", "digits"), ("goal", "fixed")
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "until", ROOT / "docs" / "until.md"
ORIGINALS = Cache(ROOT / "build" / "until", 10**11)  # what the original models sample for evaluations
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # name → model, concepts, options
    "circle": ("shapes", ["circle"], {}),
    "red": ("shapes", ["red"], {}),
    "night": ("shapes", ["night"], {}),
    "red → blue": ("shapes", ["red"], {"anchor": ["blue"]}),
    "circle, red": ("shapes", ["circle", "red"], {}),
    "star": ("shapes", ["star"], {}),
    "v: red": ("v", ["red"], {}),
    "zero-snr: night": ("zero-snr", ["night"], {}),
    "narrow: red": ("narrow", ["red"], {}),
    "narrow: night": ("narrow", ["night"], {}),
    "digits: 3": ("digits", ["class:3"], {}),
    "digits: 8": ("digits", ["class:8"], {}),
    "lr 10 times": ("shapes", ["circle"], {"lr": 3e-3}),
    "lr a tenth": ("shapes", ["circle"], {"lr": 3e-5}),
    "circle, drift 0.001": ("shapes", ["circle"], {"until": "ua>=0.98, retain_drift<=0.001"}),
    "red, ra_drop 0.01": ("shapes", ["red"], {"until": "ua>=0.98, anchor>=0.9, retain_drift<=0.02, ra_drop<=0.01"}),
    "red, 384 retain samples": ("shapes", ["red"], {"retain_latents": 384}),
    "circle, lr 3e-7": ("shapes", ["circle"], {"lr": 3e-7}),
    "circle, density 0.1": ("shapes", ["circle"], {"density": 0.1}),
    "circle, density 0.01": ("shapes", ["circle"], {"density": 0.01}),
    "red, density 0.1": ("shapes", ["red"], {"density": 0.1}),
    "red, density 0.01": ("shapes", ["red"], {"density": 0.01}),
}
USUAL = [case for case, (*_, options) in CASES.items() if options.keys() <= {"anchor"}]  # without options that force it
KEPT = ("ua", "ua_corrected", "ra_before", "ra_after", "ra_drop", "anchor", "image_drift", "verdict")
UA, RA_DROP = 98.0, 1.0  # percent, and points
HEAD = """# Erasing to a goal

**What it shows.** {shows}

Written by `benchmarks/until.py` on the bundled models and variants of one, on a CPU; {n} images of each kind. Each
case is erased by default, towards “{goal}”, and, where that is listed, with the fixed number of steps of the recipe.
The rules of the goal were found on red, circle and red → blue, and on red of `narrow`; the other cases played no part
in that. “lr 10 times”, “lr a tenth” and “lr 3e-7” force the learning rate; the recipe's is 3e-4. Each “density” trains
that fraction of the weights in place of half of them. “ra_drop 0.01” is a stricter goal, and “384 retain samples” has
so many in place of 160. “drift 0.001” is a goal that cannot be reached. Two more cannot
be asked for: an anchor that is the concept is an error, and retain prompts that name the concept are left out, with a
note. RA: images of other prompts that are as prompted. Seconds are the processor's, without the final evaluation, the
cache of samples being empty; in parentheses, the fraction that the probes take, which earlier rows do not know. Probes
and the evaluation sample the same held-out prompts with other seeds.

| case | seed | how | steps | strength | corrected UA | RA drop | anchor shown | drift | seconds | verdict |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Probing:
    """A progress that adds up the processor's seconds of each stage, and of the probes."""

    def __init__(self) -> None:
        self.seconds, self.stages, self._last = 0.0, dict[str, float](), time.process_time()

    def __call__(self, event: Event) -> None:
        now = time.process_time()
        stage = str(event.stage)
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        if "probing" in event.metrics:
            self.seconds += now - self._last
        self._last = now


def row(model: Model, concepts: list[str], options: dict[str, Any], seed: int, n: int) -> dict[str, Any]:
    """What a run achieves, and how long it took; the error of one that failed."""
    probing = Probing()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = salun.erase(
                model, concepts, seed=seed, eval_images=0, progress=probing, cache=Cache(Path(folder)), **options
            )
    except SalunError as error:
        return {"error": error.message}
    metrics = evaluated(model, run, n)
    until = run.record.more.get("until")
    return {
        "steps": len(run.history),
        "strength": until["strength"] if until else 1.0,
        "until": until,
        "seconds": sum(probing.stages.values()),
        "stages": probing.stages,
        "probes": probing.seconds,
        **{key: metrics.get(key) for key in KEPT},
    }


def evaluated(model: Model, run: Run, n: int) -> dict[str, Any]:
    """As `erase` does it, on n images of each kind; those of the original are sampled once for all runs."""
    plan, original = run.plan, model.original()
    with model.configured(plan.options):
        prompts = eval_prompts(plan, n, plan.options.seed)
        before = evaluate_model(model, prompts, stage=Stage.IMAGES_BEFORE, cache=ORIGINALS)
        model.load(run.erased)
        after = evaluate_model(model, prompts)
        model.load({name: original[name] for name in run.erased})
        return compare(model, plan, prompts, before, after)


def line(case: str, seed: int, how: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {case} | {seed} | {how} |{' |' * 7} {found['error']} |"
    values = {key: from_json(found[key], "unknown") for key in KEPT if found.get(key) and key != "verdict"}
    drop = values["ra_drop"].text("") if "ra_drop" in values else f"{_ra_drop(found):.1f}"
    probes = f" ({100 * found['probes'] / found['seconds']:.0f} %)" if how == "goal" and "probes" in found else ""
    until = found["until"]
    came = "" if until is None else ", goal reached" if until["reached"] else ", goal not reached"
    cells = [
        case, str(seed), how, str(found["steps"]), f"{found['strength']:g}", values["ua_corrected"].text(""),
        drop, values["anchor"].text(""), values["image_drift"].text("", 4),
        f"{found['seconds']:.0f}{probes}", found["verdict"]["outcome"] + came,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def path_of(case: str, seed: int, how: str, n: int) -> Path:
    """Where a result is kept."""
    return RESULTS / f"{case.replace(' ', '-').replace(':', '')}-{seed}-{how}-{n}.json"


def table(n: int) -> str:
    """All results of n images that are there, and what they show."""
    lines, pairs, usual = [], [], []
    for case, seed in itertools.product(CASES, range(10)):
        paths = {how: path_of(case, seed, how, n) for how in HOW}
        found = {how: json.loads(path.read_text(encoding="utf-8")) for how, path in paths.items() if path.exists()}
        lines += [line(case, seed, how, each) for how, each in found.items()]
        measured = {how: each for how, each in found.items() if "error" not in each}
        if case in USUAL:
            usual.append(measured)
        if case in USUAL and len(measured) == len(HOW):
            pairs.append(measured)
    shows = " ".join(_came(how, [each[how] for each in usual if how in each]) for how in HOW)
    if pairs:
        times = [pair["goal"]["seconds"] / pair["fixed"]["seconds"] for pair in pairs]
        shows += f" In the {len(pairs)} measured both ways, a goal takes {np.median(times):.2f} times as long (median)."
    goals = [each["goal"] for each in usual if "goal" in each]
    probes = [each["probes"] / each["seconds"] for each in goals if "probes" in each]
    if probes:
        shows += f" Probes take {100 * np.median(probes):.0f} % of that time (median of {len(probes)})."
    head = HEAD.format(n=f"{n:,}", goal=str(Goal()), shows=shows).split("\n\n")
    wrapped = [textwrap.fill(part, 120, break_on_hyphens=False) if part[:1] not in "#|" else part for part in head]
    return "\n\n".join(wrapped) + "\n".join(lines) + "\n"


def _came(how: str, runs: list[dict[str, Any]]) -> str:
    """What came of all runs of a kind without forced options, in a sentence."""
    erased = sum(each["verdict"]["outcome"] == "erased" for each in runs)
    reached = sum(bool(each["until"] and each["until"]["reached"]) for each in runs)
    wanted = sum(from_json(each["ua_corrected"], "").value >= UA and _ra_drop(each) <= RA_DROP for each in runs)
    text = (
        f"With a {'goal' if how == 'goal' else 'fixed number of steps'}, {erased} of {len(runs)} runs end as “erased”"
    )
    text += f", and {reached} reach the goal" if how == "goal" else ""
    return f"{text}; in {wanted}, UA is at least {UA:g} % and RA falls by at most {RA_DROP:g} point."


def _ra_drop(run: dict[str, Any]) -> float:
    """Points by which RA fell."""
    before, after = (from_json(run[key], "") for key in ("ra_before", "ra_after"))
    return before.value - after.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--how", nargs="*", default=list(HOW), choices=HOW)
    given = parser.parse_args()
    for seed, case in itertools.product(given.seeds, given.cases):
        name, concepts, options = CASES[case]
        model = salun.load(name if name in BUNDLED else str(ROOT / "build" / "variants" / name), device="cpu")
        fixed = {"steps": model.settings.recipe.steps * len(concepts)}
        for how in given.how:
            chosen = {**options, **fixed, "until": None} if how == "fixed" else options
            stored(path_of(case, seed, how, given.n), lambda of=(model, concepts, chosen, seed): row(*of, given.n))
        TABLE.write_text(table(given.n), encoding="utf-8")


if __name__ == "__main__":
    main()
