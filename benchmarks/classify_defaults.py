"""`salun classify-unlearn` at its defaults, and methods without a table: fills docs/classification-defaults.md.

    python -m benchmarks.classify_defaults          run what is missing, then write the page
    python -m benchmarks.classify_defaults --page   write it from what is there

Each run is one seed on the bundled data sets. Results are kept in `benchmarks/results/classify-defaults`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from benchmarks.stored import stored
from salun.classification.experiment import unlearn
from salun.classification.unlearn_options import UnlearnOptions
from salun.errors import TrainingError
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/classify-defaults", ROOT / "docs/classification-defaults.md"
DIGIT, RING, TENTH = ("digits", "class:3"), ("clutter", "class:ring"), ("clutter", "random:0.1")
ROWS: list[tuple[str, tuple[str, str], dict[str, Any], int]] = [  # method, (data, forget set), options, seeds
    ("salun", DIGIT, {}, 3),
    ("salun", DIGIT, {"order": "forget-first"}, 3),
    ("salun", RING, {}, 3),
    ("salun", TENTH, {}, 3),
    *[("neggrad-plus", of, {"lr": lr}, 1) for of, rates in ((RING, (0.01, 0.002, 0.0005)), (TENTH, (0.002, 0.0005)),
                                                            (DIGIT, (0.002, 0.0005))) for lr in rates],
    *[("unsir", of, options, 1) for of in (DIGIT, RING) for options in ({}, {"unsir_retain": 1.0}, {"epochs": 2})],
]  # fmt: skip
HEAD = """Written by `benchmarks/classify_defaults.py` on the bundled data sets and the small network, on a CPU: what
`salun classify-unlearn` reaches with the options of the row and otherwise its defaults. Gap: the mean of the
differences of UA, RA, TA and MIA from those of Retrain, in percentage points, by seed; of the original, which forgot
nothing, in parentheses. “diverged”: a loss was not finite."""


def measured(method: str, of: tuple[str, str], options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The gap of a run and of its original, or its error."""
    given = UnlearnOptions(method=method, data=of[0], forget=of[1], seed=seed, device="cpu", retrain="yes", **options)
    try:
        metrics = unlearn(given, progress=silent).metrics
    except TrainingError as error:
        return {"error": error.message}
    return {"gap": metrics["gap_mean"], "original": metrics["gap_original"]}


def summary() -> str:
    """What the runs of SalUn at its defaults show, and how far the original is, in a sentence."""
    parts = []
    for method, of, options, seeds in ROWS:
        paths = [_path(method, of, options, seed) for seed in range(seeds)]
        if method == "salun" and not options and all(path.exists() for path in paths):
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            ends = [f"{min(each[key] for each in found):.1f} to {max(each[key] for each in found):.1f}"
                    for key in ("gap", "original")]  # fmt: skip
            parts.append(f"{ends[0]} points on {of[0]}, `{of[1]}` (original: {ends[1]})")
    return f"**What it shows.** SalUn at its defaults ends at gaps of {'; '.join(parts)}."


def document() -> str:
    """The page."""
    lines = ["| method | data | forget set | options | gap by seed (original) |", "|---" * 5 + "|"]
    for method, of, options, seeds in ROWS:
        found = [json.loads(path.read_text(encoding="utf-8")) for seed in range(seeds)
                 if (path := _path(method, of, options, seed)).exists()]  # fmt: skip
        cells = ["diverged" if "error" in each else f"{each['gap']:.2f} ({each['original']:.1f})" for each in found]
        given = ", ".join(f"`--{name.replace('_', '-')} {value:g}`" if not isinstance(value, str) else
                          f"`--{name.replace('_', '-')} {value}`" for name, value in options.items())  # fmt: skip
        lines.append(f"| `{method}` | {of[0]} | `{of[1]}` | {given or 'none'} | {', '.join(cells) or '–'} |")
    return "\n\n".join(["# Classifiers at the defaults", _filled(summary()), _filled(HEAD), "\n".join(lines)]) + "\n"


def _path(method: str, of: tuple[str, str], options: dict[str, Any], seed: int) -> Path:
    key = hashlib.sha256(json.dumps([of, options], sort_keys=True).encode()).hexdigest()[:8]
    return RESULTS / f"{method}-{of[0]}-{seed}-{key}.json"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.page:
        for method, of, options, seeds in ROWS:
            for seed in range(seeds):
                job = method, of, options, seed
                stored(_path(*job), lambda job=job: measured(*job))
    PAGE.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
