"""Forgetting a class of a class-conditional model, by method, beside a model that was retrained without it.

    python -m benchmarks.classes [--classes 3 …] [--seeds 0] [--methods …] [--n 500] [--retrain 3 …]

Each method forgets each class of `digits`. Numbers are by the detector in the model's folder, on samples of each class:
how often the forgotten class still shows (UA is the rest), how often the others are right, and how far the samples are
from those of Retrain: by the classes that are seen under the forgotten label, and by the detector's features of all.
Prints, and writes to `docs/classes.md` after each run; results are kept in `benchmarks/results/classes`, runs and
retrained models in `build/classes`, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import salun
from benchmarks.stored import stored
from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.train import train_class_model
from salun.diffusion.train_options import ClassTrainOptions
from salun.evaluation.detectors.attribute import load_classifier
from salun.evaluation.estimate import Estimate
from salun.evaluation.metrics.frechet import frechet_distance
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE, BUILT = ROOT / "benchmarks/results/classes", ROOT / "docs/classes.md", ROOT / "build/classes"
MODEL = ROOT / "salun" / "assets" / "digits"
METHODS: dict[str, dict[str, Any]] = {  # name → options of `erase`; each trains as many steps
    "SalUn": {},
    "SalUn, random mask": {"mask": "random"},
    "SalUn-soft": {"method": "salun-soft"},
    "finetune": {"method": "finetune"},
    "ESD": {"method": "esd"},
    "EraseDiff": {"method": "erasediff"},
    "SalUn, the authors' losses": {"target": "online", "retain_target": "noise", "anchor_share": 0.0},
}
HARM = 0.5  # percentage points of accuracy on other classes that count as harm
MASKED = {"SalUn", "SalUn, random mask", "finetune"}  # half of the weights by saliency, a random half, all
HEAD = """Written by `benchmarks/classes.py` on the bundled class-conditional model `digits`
([card](../salun/assets/digits)), on a CPU: {n} samples of each class, seeds {seeds}, classes {classes}. Each method
takes the steps of the model's recipe, at the same learning rate; the anchor is the next digit.

UA: samples under the forgotten label that do not show the class; ± is the standard deviation over classes and seeds, so
±0 does not mean that UA is known exactly: of {n} samples, 100 % has a 95 % interval down to {lower:.0f} %. Others:
samples of the other classes that show theirs; “worst”: of the class where that fell most. Fréchet distances are of the
detector's features, of samples of the other classes: to those of the original model, and of all classes to those of
Retrain, a model that was trained without the class ({gold}). “Labels to Retrain”: total variation between the classes
that are seen under the forgotten label and those that Retrain shows there. Seconds on one core; the first method also
samples the training set, which the others take from the cache.
"""


def summary(rows: dict[str, list[dict[str, Any]]]) -> str:
    """What the numbers show, in sentences whose figures come from them."""
    made = {name: found for name, found in rows.items() if found}

    def mean(name: str, key: str) -> float:
        return float(np.mean([each[key]["value"] for each in made[name]]))

    ua = [mean(name, "ua") for name in made]
    lost = {name: mean(name, "others_before") - mean(name, "others") for name in made}
    harmed = [f"{name} (by {drop:.1f} percentage points)" for name, drop in lost.items() if drop >= HARM]
    said = [f"**What it shows.** Every method makes the model forget a digit (UA {_ends(ua, 0)} %); accuracy on the "
            f"others falls under {_and(harmed) if harmed else 'none'}."]  # fmt: skip
    if made.keys() >= MASKED and all(mean(name, "ua") >= 99 and lost[name] < HARM for name in MASKED):
        said.append("**The masks cannot be distinguished here**: half of the weights by saliency, a random half, and "
                    "all of them are at the ceiling of UA and of the others' accuracy.")  # fmt: skip
    return " ".join([*said, *_distances(made)])


def _distances(made: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Likewise of the Fréchet distances and of what Retrain shows."""
    far = {name: float(np.mean([each["frechet"] for each in found])) for name, found in made.items()}
    near, moved = ([name for name in far if (far[name] < 1) == small] for small in (True, False))
    said = []
    if near and moved:
        said.append(f"{_and(near)} leave the other digits nearly as they were (Fréchet distance "
                    f"{_ends([far[name] for name in near], 1)}); {_and(moved)} move them "
                    f"({_ends([far[name] for name in moved], 1)}).")  # fmt: skip
    gold = {name: [each["labels_to_retrain"] for each in found if "labels_to_retrain" in each]
            for name, found in made.items()}  # fmt: skip
    values = {name: f"{np.mean(found):.2f}" for name, found in gold.items() if found}
    if values:
        usual = max(set(values.values()), key=list(values.values()).count)
        others = "".join(f"; {name} {value}" for name, value in values.items() if value != usual)
        said.append("What they draw under the forgotten label differs from what Retrain draws there (total variation "
                    f"{usual} of 1{others}), since they are trained to draw the anchor.")  # fmt: skip
    return said


def _ends(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _and(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" if "," in name else name for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def document(given: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page."""
    gold = f"there is one for class {', '.join(map(str, given.retrain))} alone" if given.retrain else "there is none"
    listed = {name: ", ".join(map(str, getattr(given, name))) for name in ("seeds", "classes")}
    head = HEAD.format(n=given.n, lower=100 * (1 - 3.8415 / (given.n + 3.8415)), gold=gold, **listed)
    texts = [summary(rows), *head.strip().split("\n\n")]
    filled = [textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
              for text in texts]  # fmt: skip
    return "\n\n".join(["# Forgetting classes", *filled, table(rows)])


def images_of(folder: Path, n: int, seed: int) -> np.ndarray:
    """Samples (10 · n, h, w, 3), n of each label."""
    model = salun.load(str(folder), device="cpu")
    prompts = [label for label in model.labels for _ in range(n)]  # type: ignore[attr-defined]
    return sample_images(model, prompts, [item_seed(seed, "sample", i) for i in range(len(prompts))])


def seen_in(images: np.ndarray) -> dict[str, np.ndarray]:
    """What the detector sees: the label (−1 for none) and the features of each image."""
    seen = load_classifier(MODEL / "oracle").detect_images(images)
    assert seen.valid is not None and seen.features is not None
    return {"labels": np.where(seen.valid, seen.scores["class"].argmax(1), -1), "features": seen.features}


def cached(path: Path, folder: Path, n: int, seed: int) -> dict[str, np.ndarray]:
    """`seen_in` of a model's samples, kept in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **seen_in(images_of(folder, n, seed)))  # type: ignore[arg-type]
    with np.load(path) as loaded:
        return {name: loaded[name] for name in ("labels", "features")}


def retrained(label: int) -> Path:
    """The model without a class, trained unless it is there."""
    run = BUILT / f"retrain-{label}"
    if not (run / "model").is_dir():
        options = ClassTrainOptions(without=[f"class:{label}"], samples_every=0)
        train_class_model(options, run, (run / "run.json").is_file(), silent)
    return run / "model"


def row(label: int, seed: int, name: str, n: int, gold: bool) -> dict[str, Any]:
    """What a method achieves."""
    run = BUILT / f"{label}-{seed}-{name}".replace(" ", "-").replace(",", "").replace("'", "")
    if not (run / "run.json").is_file() or json.loads((run / "run.json").read_text())["status"] != "done":
        steps = salun.load(str(MODEL), device="cpu").settings.recipe.steps
        options = {"steps": steps, "seed": seed, "eval_images": 16, **METHODS[name]}
        salun.erase(str(MODEL), f"class:{label}", run_dir=run, resume=True, progress=silent, **options)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    before = cached(BUILT / f"original-{n}.npz", MODEL, n, 0)
    after = cached(run / f"seen-{n}.npz", run / "model", n, 0)
    truth = np.repeat(np.arange(10), n)
    others = truth != label
    right = {side: of["labels"] == truth for side, of in (("before", before), ("after", after))}
    by_class = {k: 100 * float(right["after"][truth == k].mean() - right["before"][truth == k].mean())
                for k in range(10) if k != label}  # fmt: skip
    found = {
        "ua": Estimate.percentage(after["labels"][~others] != label).as_json(),
        "others_before": Estimate.percentage(right["before"][others]).as_json(),
        "others": Estimate.percentage(right["after"][others]).as_json(),
        "worst": min(by_class.items(), key=lambda each: each[1]),
        "frechet": frechet_distance(before["features"][others], after["features"][others]),
        "seconds": sum(record["timings"].values()), "training": record["timings"]["training"],
        "selected": record["mask"]["selected"] / record["mask"]["total"],
    }  # fmt: skip
    if gold:
        best = cached(BUILT / f"retrain-{label}" / f"seen-{n}.npz", retrained(label), n, 0)
        histograms = [np.bincount(of["labels"][~others] + 1, minlength=11) / n for of in (after, best, before)]
        found |= {
            "labels_to_retrain": 0.5 * float(np.abs(histograms[0] - histograms[1]).sum()),
            "frechet_to_retrain": frechet_distance(best["features"], after["features"]),
            "frechet_of_original_to_retrain": frechet_distance(best["features"], before["features"]),
            "retrain_others": 100 * float((best["labels"] == truth)[others].mean()),
        }
    return found


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A method a line, means over classes and seeds."""
    lines = [
        "| method | UA, % | the others right, % (before) | worst class | Fréchet to the original | labels to Retrain | "
        "Fréchet to Retrain (original) | mask, % | seconds |",
        "|---" * 9 + "|",
    ]
    for name, found in rows.items():
        if not found:
            continue
        mean = {key: np.mean([each[key]["value"] for each in found]) for key in ("ua", "others", "others_before")}
        worst = min((each["worst"] for each in found), key=lambda each: each[1])
        gold = [each for each in found if "frechet_to_retrain" in each]
        far = "–" if not gold else f"{np.mean([each['labels_to_retrain'] for each in gold]):.2f}"
        near = "–"
        if gold:
            of = [np.mean([each[k] for each in gold]) for k in ("frechet_to_retrain", "frechet_of_original_to_retrain")]
            near = f"{of[0]:.2f} ({of[1]:.2f})"
        spread = np.std([each["ua"]["value"] for each in found])
        lines.append(
            f"| {name} | {mean['ua']:.1f} ± {spread:.1f} | {mean['others']:.1f} ({mean['others_before']:.1f}) | "
            f"{worst[0]}: {worst[1]:+.1f} | {np.mean([each['frechet'] for each in found]):.2f} | {far} | {near} | "
            f"{100 * np.mean([each['selected'] for each in found]):.0f} | "
            f"{np.mean([each['seconds'] for each in found]):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--retrain", type=int, nargs="*", default=[], help="classes with a retrained model")
    parser.add_argument("--n", type=int, default=500)
    given = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in given.methods}
    for seed in given.seeds:
        for label in given.classes:
            for name in given.methods:
                gold = label in given.retrain
                file = f"{label}-{seed}-{name}-{given.n}{'-retrain' if gold else ''}.json"
                path = RESULTS / file.replace(" ", "-").replace(",", "").replace("'", "")
                rows[name].append(stored(path, lambda of=(label, seed, name, given.n, gold): row(*of)))
                TABLE.write_text(document(given, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
