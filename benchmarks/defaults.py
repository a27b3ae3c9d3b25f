"""What `erase` does by default, and the recipe's fixed number of steps, on models that no recipe was tuned on.

    python -m benchmarks.defaults [--models shapes v zero-snr narrow] [--concepts circle red night]

Erases each concept from each model (`python -m tools.shapes.variants` makes them) to the default goal, and with the
steps of the recipe. Prints, and writes to `docs/defaults.md`, what `run.json` says: UA, retain accuracy before and
after, the verdict. Results are kept in `benchmarks/results/defaults`, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import salun
from benchmarks.stored import stored
from salun.evaluation.estimate import from_json
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "defaults", ROOT / "docs" / "defaults.md"
MODELS = ("shapes", "v", "zero-snr", "narrow")
CONCEPTS = ("circle", "red", "night")
HOW = ("goal", "fixed")
IMAGES, RECIPE = 128, 120  # of each kind; steps of the recipe
HEAD = """# The defaults on other models

**What it shows.** By default, `erase` trains to a goal. Corrected UA is {least:.1f} % or more in all {goals} cases,
on models most of which no number was tuned on; {goal} end as “erased”{goal_not}.
With the recipe's fixed number of steps, which was tuned on `shapes`, {fixed} of {fixeds} end as “erased”{fixed_not}.
These are variants of one small model; nothing here says how the defaults for Stable Diffusion do.

Written by `benchmarks/defaults.py`, on a CPU; {images} images of each kind, one seed; intervals are 95 %. Models are
made by `tools/shapes/variants.py`, and judged by the classifier of `shapes`. Intervals of corrected UA take images of
one prompt as independent. Rows “fixed” are earlier measurements, on an earlier training of the variants, whose other
intervals do so too: no paired comparison.

{models}
"""
WHAT = {
    "shapes": "the bundled model itself",
    "v": "predicts v",
    "zero-snr": "predicts v, and the last step of its schedule is pure noise",
    "narrow": "has fewer weights and was trained from nothing",
}


def row(name: str, concept: str, how: str) -> dict[str, Any]:
    """What an erasure achieves."""
    folder = ROOT / "build" / "variants" / name
    model = salun.load("shapes" if name == "shapes" else str(folder), device="cpu")
    steps = model.settings.recipe.steps if how == "fixed" else None
    run = salun.erase(model, concept, steps=steps, eval_images=IMAGES, progress=silent)
    kept = ("ua", "ua_corrected", "ra_before", "ra_after", "anchor", "image_drift", "anchor_gap", "verdict")
    found = {"model": name, "concept": concept, "how": how} | {key: run.metrics.get(key) for key in kept}
    return found | {"until": run.record.more.get("until")}


def table(rows: list[dict[str, Any]]) -> str:
    models = "\n".join(f"- `{name}`: {WHAT[name]}." for name in dict.fromkeys(each["model"] for each in rows))
    counts = {
        how: [each["verdict"]["outcome"] == "erased" for each in rows if each.get("how", "fixed") == how] for how in HOW
    }
    of: dict[str, Any] = {how: sum(erased) for how, erased in counts.items()}
    of |= {f"{how}s": len(erased) for how, erased in counts.items()}
    of |= {"least": min(each["ua_corrected"]["value"] for each in rows if each.get("how") == "goal")}
    of |= {f"{how}_not": _not_erased(rows, how) for how in HOW}
    out = [
        HEAD.format(images=IMAGES, models=models, **of),
        "| model | concept | how | steps | corrected UA, % | other images right, before | after | verdict |",
    ]
    out.append("|---" * 8 + "|")
    for each in rows:
        cells = [from_json(each[key], "unknown").text("") for key in ("ua_corrected", "ra_before", "ra_after")]
        how, until = each.get("how", "fixed"), each.get("until")
        named = f"{each['model']} | {each['concept']} | {how} | {until['steps'] if until else RECIPE}"
        out.append(f"| {named} | {' | '.join(cells)} | {each['verdict']['outcome']} |")
    return "\n".join(out) + "\n"


def _not_erased(rows: list[dict[str, Any]], how: str) -> str:
    """What does not end as erased, with the two numbers behind the verdict."""
    wrong = []
    for each in rows:
        if each.get("how", "fixed") == how and each["verdict"]["outcome"] != "erased":
            ua, before, after = (each[key]["value"] for key in ("ua_corrected", "ra_before", "ra_after"))
            numbers = f"UA {ua:.1f} %, other images right {before:.1f} → {after:.1f} %"
            wrong.append(f"*{each['concept']}* on `{each['model']}` as “{each['verdict']['outcome']}” ({numbers})")
    return ", but " + ", ".join(wrong) if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    given = parser.parse_args()
    for name, concept, how in itertools.product(given.models, given.concepts, HOW):
        stored(path_of(name, concept, how), lambda of=(name, concept, how): row(*of))
        known = (path_of(*each) for each in itertools.product(MODELS, CONCEPTS, HOW))
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in known if path.exists()]
        TABLE.write_text(table(rows), encoding="utf-8")


def path_of(name: str, concept: str, how: str) -> Path:
    """Where a result is kept."""
    return RESULTS / f"{name}-{concept}{'-goal' if how == 'goal' else ''}.json"


if __name__ == "__main__":
    main()
