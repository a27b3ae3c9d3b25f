"""How fast a forgotten class is learned again, next to a model that was retrained without it: fills docs/relearning.md.

    python -m benchmarks.relearning [--class 3] [--n 64] [--methods …]      run what is missing, then write the page
    python -m benchmarks.relearning --page                                  write it from what is there

Each model of `digits` is fine-tuned on images of the class (`salun attack --attack relearn`), and looked at on the way.
The erased models and Retrain are those of `benchmarks/classes.py`. Results: `benchmarks/results/relearning`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.classes import BUILT, METHODS, MODEL, ROOT, file_name, forgotten, retrained
from benchmarks.stored import stored
from salun.diffusion.attack import attack
from salun.diffusion.attack_options import AttackOptions

RESULTS, PAGE = ROOT / "benchmarks/results/relearning", ROOT / "docs/relearning.md"
RETRAIN, SEED = "Retrain", 0
HEAD = """Written by `benchmarks/relearning.py` on the bundled class-conditional model `digits`, on a CPU: the attack
`relearn` of the small budget on models that forgot class {label} and on Retrain, which was trained without it and so
never knew it. All weights are fine-tuned on images of the class for 60 steps. Cells: samples under its label that show
it, in percent of {n}. Half: the first look at which that is half as often as in the original. An erased model that
learns the class no faster than Retrain holds no more of it than a model that never saw it."""


def measured(label: int, name: str, n: int) -> dict[str, Any]:
    """What relearning does to a model."""
    folder = retrained(label) if name == RETRAIN else forgotten(label, SEED, name)[0] / "model"
    options = AttackOptions(
        concept=[f"class:{label}"], against=str(MODEL), attack=["relearn"], n=n, images=n, device="cpu", seed=1
    )
    (made,) = attack(str(folder), options).as_json()["attacks"]
    return {"class": label, "n": n, **{key: made[key] for key in ("curve", "facts", "options", "asr")}}


def document(label: int, n: int) -> str:
    """The page."""
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name in [*METHODS, RETRAIN]
             if (path := _path(label, name, n)).exists()}  # fmt: skip
    looks = [step for step, _ in next(iter(found.values()))["curve"]]
    lines = [f"| | {' | '.join(f'{step:g} steps' for step in looks)} | half |", "|---" * (len(looks) + 2) + "|"]
    for name, made in found.items():
        half = made["facts"]["steps_to_half"]
        cells = [f"{100 * rate:.0f}" for _, rate in made["curve"]]
        lines.append(f"| {name} | {' | '.join(cells)} | {half or f'> {looks[-1]:g}'} |")
    halves = {name: made["facts"]["steps_to_half"] or f"more than {looks[-1]:g}" for name, made in found.items()}
    listed = ", ".join(f"{name} {half}" for name, half in halves.items())
    said = f"**What it shows.** Steps until the class shows half as often as in the original: {listed}."
    texts = [textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)
             for text in (said, HEAD.format(label=label, n=n))]  # fmt: skip
    return "\n\n".join(["# Relearning a class", *texts, "\n".join(lines)]) + "\n"


def _path(label: int, name: str, n: int) -> Path:
    return RESULTS / f"{file_name(label, SEED, name)}-{n}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", type=int, default=3, dest="label")
    parser.add_argument("--n", type=int, default=64, help="samples under the label")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, RETRAIN])
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    given = parser.parse_args()
    BUILT.mkdir(parents=True, exist_ok=True)
    for name in [] if given.page else given.methods:
        stored(_path(given.label, name, given.n), lambda name=name: measured(given.label, name, given.n))
    PAGE.write_text(document(given.label, given.n), encoding="utf-8")


if __name__ == "__main__":
    main()
