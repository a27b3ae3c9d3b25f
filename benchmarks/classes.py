"""Forgetting a class of a class-conditional model, by method, beside a model that was retrained without it.

    python -m benchmarks.classes [--classes 3 …] [--seeds 0] [--methods …] [--n 500] [--others 100] [--retrain 3 …]

Each method forgets each class of `digits`. Numbers are by the detector in the model's folder, on samples of each class:
how often the forgotten class still shows (UA is the rest), how often the others are right, and how far the samples are
from those of Retrain: by the classes that are seen under the forgotten label, and by the detector's features of all.
Results are kept in `benchmarks/results/classes`, runs and retrained models in `build/classes`, so an interrupted
benchmark continues; `docs/classes.md` is written after each run, of all results that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import salun
from benchmarks.classes_page import document
from benchmarks.stored import stored
from benchmarks.until import Probing
from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.train import train_class_model
from salun.diffusion.train_options import ClassTrainOptions
from salun.evaluation.detectors.attribute import load_classifier
from salun.evaluation.estimate import Estimate
from salun.evaluation.metrics.frechet import frechet_distance
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE, BUILT = ROOT / "benchmarks/results/classes", ROOT / "docs/classes.md", ROOT / "build/classes"
MODEL, CLASSES = ROOT / "salun" / "assets" / "digits", 10
MOST = 10_000  # samples of a label
AUTHORS = {"target": "online", "retain_target": "noise", "anchor_share": 0.0}
METHODS: dict[str, dict[str, Any]] = {  # name → options of `erase`; each trains as many steps
    "SalUn": {},
    "SalUn, random mask": {"mask": "random"},
    "SalUn, all weights": {"mask": "full"},
    "the authors' losses": AUTHORS,
    "the authors' losses, random mask": {**AUTHORS, "mask": "random"},
    "the authors' losses, all weights": {**AUTHORS, "mask": "full"},
    "SalUn-soft": {"method": "salun-soft"},
    "ESD": {"method": "esd"},
    "EraseDiff": {"method": "erasediff"},
}
TRAINED = ("saliency", "frozen targets", "training")  # stages that make the erased model, samples apart


def images_of(folder: Path, counts: list[int], seed: int) -> np.ndarray:
    """Samples (Σ counts, h, w, 3): so many of each label; sample i of a label has the same seed whatever the counts."""
    model = salun.load(str(folder), device="cpu")
    labels = zip(model.labels, counts, strict=True)  # type: ignore[attr-defined]
    prompts = [label for label, count in labels for _ in range(count)]
    numbers = [MOST * label + i for label, count in enumerate(counts) for i in range(count)]
    return sample_images(model, prompts, [item_seed(seed, "sample", number) for number in numbers])


def seen_in(images: np.ndarray) -> dict[str, np.ndarray]:
    """What the detector sees: the label (−1 for none) and the features of each image."""
    seen = load_classifier(MODEL / "oracle").detect_images(images)
    assert seen.valid is not None and seen.features is not None
    return {"labels": np.where(seen.valid, seen.scores["class"].argmax(1), -1), "features": seen.features}


def cached(path: Path, folder: Path, counts: list[int], seed: int) -> dict[str, np.ndarray]:
    """`seen_in` of a model's samples, kept in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **seen_in(images_of(folder, counts, seed)))  # type: ignore[arg-type]
    with np.load(path) as loaded:
        return {name: loaded[name] for name in ("labels", "features")}


def original(label: int, counts: list[int]) -> dict[str, np.ndarray]:
    """What the original model shows, a label a file, so that classes to be forgotten share their others."""
    parts = [
        cached(BUILT / f"original-{k}-{n}.npz", MODEL, [n if each == k else 0 for each in range(CLASSES)], 0)
        for k, n in enumerate(counts)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def retrained(label: int) -> Path:
    """The model without a class, trained unless it is there."""
    run = BUILT / f"retrain-{label}"
    if not (run / "model").is_dir():
        options = ClassTrainOptions(without=[f"class:{label}"], samples_every=0)
        train_class_model(options, run, (run / "run.json").is_file(), silent)
    return run / "model"


def forgotten(label: int, seed: int, name: str) -> tuple[Path, dict[str, Any]]:
    """The run that forgets a class, made unless it is there, and its record."""
    run = BUILT / file_name(label, seed, name)
    seconds = run / "processor_seconds.json"
    if not seconds.is_file():
        steps = salun.load(str(MODEL), device="cpu").settings.recipe.steps
        options = {"steps": steps, "seed": seed, "eval_images": 0, **METHODS[name]}
        spent = Probing()
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped: its seconds are lost
        salun.erase(str(MODEL), f"class:{label}", run_dir=run, progress=spent, **options)
        seconds.write_text(json.dumps(spent.stages), encoding="utf-8")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return run, {**record, "processor_seconds": json.loads(seconds.read_text(encoding="utf-8"))}


def row(label: int, seed: int, name: str, n: int, others: int, retrain: bool) -> dict[str, Any]:
    """What a method achieves."""
    run, record = forgotten(label, seed, name)
    counts = [n if k == label else others for k in range(CLASSES)]
    before = original(label, counts)
    after = cached(run / f"seen-{n}-{others}.npz", run / "model", counts, 0)
    truth = np.repeat(np.arange(CLASSES), counts)
    kept = truth != label
    right = {side: of["labels"] == truth for side, of in (("before", before), ("after", after))}
    by_class = {k: 100 * float(right["after"][truth == k].mean() - right["before"][truth == k].mean())
                for k in range(CLASSES) if k != label}  # fmt: skip
    spent = record["processor_seconds"]
    found = {
        "class": label, "seed": seed, "options": METHODS[name],
        "ua": Estimate.percentage(after["labels"][~kept] != label).as_json(),
        "others_before": Estimate.percentage(right["before"][kept]).as_json(),
        "others": Estimate.percentage(right["after"][kept]).as_json(),
        "worst": min(by_class.items(), key=lambda each: each[1]),
        "frechet": frechet_distance(before["features"][kept], after["features"][kept]),
        "seconds": sum(spent.get(stage, 0.0) for stage in TRAINED), "stages": spent,
        "selected": record["mask"]["selected"] / record["mask"]["total"],
    }  # fmt: skip
    if retrain:
        best = cached(BUILT / f"retrain-{label}" / f"seen-{n}-{others}.npz", retrained(label), counts, 0)
        shown = [np.bincount(of["labels"][~kept] + 1, minlength=CLASSES + 1) / n for of in (after, best)]
        found |= {
            "labels_to_retrain": 0.5 * float(np.abs(shown[0] - shown[1]).sum()),
            "frechet_to_retrain": frechet_distance(best["features"], after["features"]),
            "frechet_of_original_to_retrain": frechet_distance(best["features"], before["features"]),
            "retrain_others": 100 * float((best["labels"] == truth)[kept].mean()),
        }
    return found


def file_name(label: int, seed: int, name: str) -> str:
    """Of a run."""
    return f"{label}-{seed}-{name}".replace(" ", "-").replace(",", "").replace("'", "")


def results_of(n: int, others: int) -> dict[str, list[dict[str, Any]]]:
    """Method → the results of its runs with so many samples; of a run measured both ways, that with Retrain."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in METHODS:
        runs = [(label, seed) for path in RESULTS.glob(f"*-{n}-{others}*.json")
                for label, seed in [tuple(map(int, path.name.split("-")[:2]))]]  # fmt: skip
        for label, seed in sorted(set(runs)):
            stems = [f"{file_name(label, seed, name)}-{n}-{others}{ending}" for ending in ("-retrain", "")]
            paths = [path for stem in stems if (path := RESULTS / f"{stem}.json").exists()]
            if paths:
                found.setdefault(name, []).append(json.loads(paths[0].read_text(encoding="utf-8")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="*", default=list(range(CLASSES)))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--retrain", type=int, nargs="*", default=[], help="classes with a retrained model")
    parser.add_argument("--n", type=int, default=500, help="samples of the forgotten class")
    parser.add_argument("--others", type=int, default=100, help="of each other class")
    given = parser.parse_args()
    for seed in given.seeds:
        for label in given.classes:
            for name in given.methods:
                retrain = label in given.retrain
                ending = "-retrain" if retrain else ""
                path = RESULTS / f"{file_name(label, seed, name)}-{given.n}-{given.others}{ending}.json"
                stored(path, lambda of=(label, seed, name, given.n, given.others, retrain): row(*of))
                TABLE.write_text(document(results_of(given.n, given.others), given.n, given.others), encoding="utf-8")


if __name__ == "__main__":
    main()
