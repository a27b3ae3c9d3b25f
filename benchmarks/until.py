"""Erasing towards the default goal (`--until`), beside the fixed recipe, on cases that nobody tuned for.

    python -m benchmarks.until [--n 1000] [--seeds 0 1 2] [--cases circle red night ...]

Each case is erased without options, and with the fixed number of steps; the cache of samples is empty for both.
Prints, and writes to `docs/until.md` after each run, what `run.json` says and the wall time without the final
evaluation. Results are kept in `benchmarks/results/until`, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import salun
from benchmarks.stored import stored
from salun.diffusion.model.stable_diffusion import Model
from salun.evaluation.estimate import from_json
from salun.progress import Event
from salun.runs.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "until", ROOT / "docs" / "until.md"
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # name → model, concepts, options
    "circle": ("shapes", ["circle"], {}),
    "red": ("shapes", ["red"], {}),
    "night": ("shapes", ["night"], {}),
    "red → blue": ("shapes", ["red"], {"anchor": ["blue"]}),
    "circle, red": ("shapes", ["circle", "red"], {}),
    "v: red": ("v", ["red"], {}),
    "zero-snr: night": ("zero-snr", ["night"], {}),
    "narrow: red": ("narrow", ["red"], {}),
    "lr 10 times": ("shapes", ["circle"], {"lr": 3e-3}),
    "lr a tenth": ("shapes", ["circle"], {"lr": 3e-5}),
}
KEPT = ("ua", "ua_corrected", "ra_before", "ra_after", "anchor", "image_drift", "verdict")
HEAD = """# Erasing to a goal

**What it shows.** A goal is reached where the fixed number of steps fails (*red* on `narrow`: UA 100 instead of 74
%), and less is changed where less suffices (*circle*: 84 steps instead of 120, and 85 % of the change). It takes one
and a half times as long in the median, since probes sample images. There are three cases and one seed; on *circle*
and *red* of `shapes` both ways erase, and their metrics do not differ clearly.

Written by `benchmarks/until.py` on the bundled model and its variants, on a CPU; {n} images of each kind. Each case is
erased without options, towards “{goal}”, and with the fixed number of steps of the recipe. RA:
images of other prompts that are as prompted. Seconds are those of the run without the
final evaluation, the cache of samples being empty; in parentheses, the share that the probes take.

| case | seed | how | steps | strength | UA | RA drop | anchor shown | drift | seconds | verdict |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Probing:
    """A progress that adds up the seconds of the probes."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.perf_counter()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if "probing" in event.metrics:
            self.seconds += now - self._last
        self._last = now


def row(model: Model, concepts: list[str], options: dict[str, Any], seed: int, n: int) -> dict[str, Any]:
    """What a run achieves, and how long it took."""
    probing = Probing()
    with tempfile.TemporaryDirectory() as folder:
        run = salun.erase(
            model, concepts, seed=seed, eval_images=n, progress=probing, cache=Cache(Path(folder)), **options
        )
    until = run.record.more.get("until")
    seconds = {str(stage): taken for stage, taken in run.record.timings.items()}
    return {
        "steps": len(run.history),
        "strength": until["strength"] if until else 1.0,
        "until": until,
        "seconds": sum(taken for stage, taken in seconds.items() if stage != "evaluating"),
        "probing": probing.seconds,
        **{key: run.metrics.get(key) for key in KEPT},
    }


def line(case: str, seed: int, how: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    values = {key: from_json(found[key], "unknown") for key in KEPT if key != "verdict"}
    before, after = (getattr(values[key], "value", float("nan")) for key in ("ra_before", "ra_after"))
    share = f" ({100 * found['probing'] / found['seconds']:.0f} %)" if how == "goal" else ""
    cells = [
        case, str(seed), how, str(found["steps"]), f"{found['strength']:g}", values["ua"].text(""),
        f"{before - after:.1f}", values["anchor"].text(""), values["image_drift"].text("", 4),
        f"{found['seconds']:.0f}{share}", found["verdict"]["outcome"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines, times, goal = [], [], ""
    for seed in given.seeds:
        for case in given.cases:
            name, concepts, options = CASES[case]
            model = salun.load("shapes" if name == "shapes" else str(ROOT / "build" / "variants" / name), device="cpu")
            fixed = {"steps": model.settings.recipe.steps * len(concepts)}
            both = {}
            for how, more in (("goal", {}), ("fixed", fixed)):
                path = RESULTS / f"{case.replace(' ', '-').replace(':', '')}-{seed}-{how}-{given.n}.json"
                chosen = {**options, **more}
                both[how] = stored(path, lambda of=(model, concepts, chosen, seed): row(*of, given.n))
                lines.append(line(case, seed, how, both[how]))
                print(lines[-1], flush=True)
            goal = both["goal"]["until"]["goal"]
            times.append(both["goal"]["seconds"] / both["fixed"]["seconds"])
            end = f"\nTime relative to the fixed recipe: median {np.median(times):.2f} over {len(times)} pairs.\n"
            TABLE.write_text(HEAD.format(n=given.n, goal=goal) + "\n".join(lines) + "\n" + end, encoding="utf-8")


if __name__ == "__main__":
    main()
