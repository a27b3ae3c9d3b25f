"""The original model as detector (`self`) beside the attribute classifier and the drawn truth, on `shapes`.

    python -m benchmarks.detectors [--n 500] [--concepts circle star ...]

For each concept: n images each of its prompts, of other prompts and of the erased model, and n drawings of known
content, encoded by the VAE. Prints, and writes `docs/detectors.md` after each concept: misses and false alarms with
95 % intervals, the agreement of both detectors, the time of a detection relative to sampling the same images, and how
the AUC depends on the timesteps. Results are kept in `benchmarks/results/detectors`, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import salun
from benchmarks.stored import stored
from salun.diffusion.data.latents import decode_images, item_seed, sample_latents
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan, spread
from salun.evaluation.calibration import Calibration, auc, fitting
from salun.evaluation.detector import DetectorInputs, Samples, load_detector
from salun.evaluation.detectors import self_classifier
from salun.evaluation.detectors.self_classifier import FRACTIONS, SelfClassifier
from salun.evaluation.estimate import Estimate
from salun.progress import silent
from tools.shapes import world

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "detectors", ROOT / "docs" / "detectors.md"
FEW = 200  # images of each kind in the second part
CONCEPTS = ("circle", "star", "red", "blue", "night", "sketch")  # two of each attribute
SEED = 101
HEAD = """# The original model as detector

**What it shows.** The original model, as its own detector, comes close to a classifier that was trained for these
images: it misses 0 to 7 % of the images of a concept and raises a false alarm in at most 1.1 % of others; the AUC is
0.99 or more for all six concepts. Colors are its weak point (5 and 7 % missed, on drawings 12 and 18 %). It takes a
quarter to a third of the time of sampling. More noises would hardly help; a calibrated threshold is needed.

Written by `benchmarks/detectors.py` on the bundled model: {n} images of each kind, on a CPU. `self` compares the
original network's denoising errors under the prompts “concept”, “anchor” and the empty one, for one noise ε and −ε, at
the timesteps that it chose on 24 of the original's images of each kind, with the threshold that an erasure would use.
Those 24 are among the 500. Intervals are 95 %.

- Misses: images of the concept's prompts by the original model in which the detector does not see the concept.
- False alarms: likewise in images of other prompts and of the anchor's.
- Drawn: the same on drawings of known content, encoded by the VAE.
- After: images of the concept's prompts by the erased model in which the detector sees it.
- Agreement: images of both models on which `self` and the attribute classifier agree.
- Time: of choosing and detecting by `self`, relative to sampling the images that are judged.
"""


def percentage(hits: np.ndarray) -> str:
    return Estimate.percentage(hits).text("")


def drawn(model: Model, n: int) -> tuple[Samples, list[world.Scene]]:
    """n drawings of random scenes, encoded."""
    rng = np.random.default_rng(SEED)
    scenes = [world.random_scene(rng, calm=True) for _ in range(n)]
    images = np.stack([world.draw(scene, rng, calm=True) for scene in scenes])
    latents = np.concatenate([model.encode_images(images[i : i + 64]).numpy() for i in range(0, n, 64)])
    return Samples(images, torch.from_numpy(latents), [""] * n), scenes


def row(model: Model, concept: str, n: int) -> dict[str, Any]:
    """What is measured for one concept."""
    plan = make_plan(model.settings, "shapes", concept, EraseOptions())
    subject = plan.subjects[0]
    inputs = DetectorInputs([subject], model.settings.detector, model)
    detectors = {name: load_detector(name, inputs) for name in ("self", "attribute")}
    of_concept, others = plan.prompts.concepts[0].eval_forget, plan.prompts.eval_retain
    seconds: list[float] = []

    def sampled(prompts: list[Any], first: int) -> Samples:
        texts = [prompts[i].text for i in spread(n, len(prompts), SEED)]
        began = time.perf_counter()
        latents = sample_latents(model, texts, [item_seed(SEED, "eval", first + i) for i in range(n)])
        seconds.append(time.perf_counter() - began)
        return Samples(decode_images(model, latents), latents, texts)

    before, other = sampled(of_concept, 0), sampled(others, n)
    anchor = sampled(plan.prompts.concepts[0].eval_anchor, 0)
    run = salun.erase(model, concept, steps=model.settings.recipe.steps, eval_images=0, progress=silent)
    run.apply()
    after = sampled(of_concept, 0)
    run.undo()
    drawings, scenes = drawn(model, n)
    truth = np.array([concept in (s.shape, s.colour, s.style) for s in scenes])
    found: dict[str, Any] = {"concept": concept, "anchor": subject.anchor, "n": n}
    shown: dict[str, list[np.ndarray]] = {}
    for name, detector in detectors.items():
        target = detector.target(subject)
        assert target is not None
        began = time.perf_counter()
        if isinstance(detector, SelfClassifier):
            detector.fit({concept: before}, other_of(other, anchor))
            found["timesteps"] = detector.timesteps[concept]
        seen = [detector.detect(part) for part in (before, other, anchor, after)]
        taken = time.perf_counter() - began
        seen.append(detector.detect(drawings))
        scores = [each.scores[target.attribute][:, target.label] for each in seen]
        negatives = np.concatenate(scores[1:3])
        calibration = Calibration.of_scores(scores[0], negatives, seen[0].threshold, seen[0].adjustable)
        hits = [each >= calibration.threshold for each in scores]
        shown[name] = hits[:4]
        found[name] = {
            "misses": percentage(~hits[0]),
            "false alarms": percentage(np.concatenate(hits[1:3])),
            "drawn misses": percentage(~hits[4][truth]),
            "drawn false alarms": percentage(hits[4][~truth]),
            "after": percentage(hits[3]),
            "AUC": calibration.auc,
            "threshold": calibration.threshold,
            "time": taken / sum(seconds),
        }
    found["agreement"] = percentage(np.concatenate(shown["self"]) == np.concatenate(shown["attribute"]))
    found["by timesteps"] = by_timesteps(detectors["self"], concept, before, other_of(other, anchor))
    return found


def other_of(other: Samples, anchor: Samples) -> Samples:
    """Both, taking turns, so that the first ones are of both kinds."""
    images = np.stack([other.images, anchor.images], 1).reshape(-1, *other.images.shape[1:])
    latents = torch.stack([other.latents, anchor.latents], 1).flatten(0, 1)
    return Samples(images, latents, [text for pair in zip(other.prompts, anchor.prompts, strict=True) for text in pair])


def by_timesteps(detector: Any, concept: str, before: Samples, other: Samples) -> dict[str, Any]:
    """AUC of `self` on 200 images of each kind at each timestep alone, at all of them, and at those that it chose."""
    parts, chosen, found = (before[:200], other[:200]), detector.timesteps[concept], {}
    for name, timesteps in ({str(t): (t,) for t in FRACTIONS} | {"all": FRACTIONS, "chosen": chosen}).items():
        detector.timesteps[concept] = timesteps
        scores = [detector.detect(each).scores[concept][:, 0] for each in parts]
        found[name] = {"AUC": auc(*scores), "passes": 6 * len(timesteps)}
    detector.timesteps[concept] = chosen
    return found


def choices(model: Model, concept: str) -> dict[str, Any]:
    """Noise draws, thresholds, and mixtures of known proportion, on `FEW` images of each kind."""
    plan = make_plan(model.settings, "shapes", concept, EraseOptions())
    detector = load_detector("self", DetectorInputs(plan.subjects, None, model))
    assert isinstance(detector, SelfClassifier)
    prompts = plan.prompts
    kinds = (prompts.concepts[0].eval_forget, prompts.eval_retain, prompts.concepts[0].eval_anchor)
    made = []
    for kind, of in enumerate(kinds):
        texts = [of[i].text for i in spread(FEW, len(of), SEED)]
        latents = sample_latents(model, texts, [item_seed(SEED, "eval", kind * FEW + i) for i in range(FEW)])
        made.append(Samples(np.zeros((FEW, 1, 1, 3), np.uint8), latents, texts))
    shown, others = made[0], other_of(made[1], made[2])
    on = [fitting(len(each)) for each in (shown, others)]
    detector.fit({concept: shown[np.flatnonzero(on[0])]}, others[np.flatnonzero(on[1])])
    shown, others = shown[np.flatnonzero(~on[0])], others[np.flatnonzero(~on[1])]
    drawn_scores = []
    for seed in range(17, 21):
        self_classifier.SEED = seed
        drawn_scores.append([detector.detect(each).scores[concept][:, 0] for each in (shown, others)])
    self_classifier.SEED = 17
    found: dict[str, Any] = {"concept": concept, "timesteps": detector.timesteps[concept]}
    for k in (1, 2, 4):
        found[f"AUC, {k} × ±ε"] = auc(*(np.mean([d[side] for d in drawn_scores[:k]], 0) for side in (0, 1)))
    scores = drawn_scores[0]
    chosen = Calibration.of_scores(*scores, 0.0, adjustable=True).threshold
    for name, threshold in (("largest score", 0.0), ("calibrated threshold", chosen)):
        wrong = (scores[0] < threshold).mean(), (scores[1] >= threshold).mean()
        found[name] = f"{100 * wrong[0]:.1f} / {100 * wrong[1]:.1f}"
    found["mixtures"] = {str(share): mixture(*scores, share) for share in (0.0, 0.1, 0.5, 1.0)}
    return found


def mixture(shown: np.ndarray, others: np.ndarray, share: float) -> str:
    """Mean corrected percentage with the concept, over 200 halvings into images to calibrate on and 100 to judge."""
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        parts = [np.split(rng.permutation(each), [len(each) // 2]) for each in (shown, others)]
        calibration = Calibration.of_scores(parts[0][0], parts[1][0], 0.0, adjustable=True)
        judged = np.concatenate([
            rng.choice(parts[0][1], round(100 * share)),
            rng.choice(parts[1][1], 100 - round(100 * share)),
        ])  # fmt: skip
        value = calibration.corrected(judged >= calibration.threshold)
        assert isinstance(value, Estimate)
        values.append(100 - value.value)
    return f"{np.mean(values):.1f}"


def choices_table(rows: list[dict[str, Any]]) -> str:
    """As text, after the table of figures."""
    columns = [name for name in rows[0] if name not in ("concept", "timesteps", "mixtures")]
    shares = list(rows[0]["mixtures"])
    out = [
        "",
        f"How many noises, and what threshold: on {FEW} images of the concept and {2 * FEW} others by the original,",
        "without those on which the timesteps were chosen. Errors are misses / false alarms in percent, by the label",
        "with the largest score and by the calibrated threshold. A noise is ε and −ε; `self` uses one: more hardly",
        "help, so there is nothing that an early stop could save. The largest score is not enough: most red shapes are",
        "missed.",
        "",
        f"| concept | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for each in rows:
        cells = [f"{each[name]:.4f}" if isinstance(each[name], float) else each[name] for name in columns]
        out.append(f"| {each['concept']} | {' | '.join(cells)} |")
    out += [
        "",
        "Mixtures of known proportion: percent of 100 images that show the concept, as corrected by the calibration on",
        "other images; mean of 200 draws.",
        "",
        f"| concept | {' | '.join(f'{100 * float(share):.0f} %' for share in shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    out += [f"| {each['concept']} | {' | '.join(each['mixtures'].values())} |" for each in rows]
    return "\n".join(out) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("misses", "false alarms", "drawn misses", "drawn false alarms", "after")
    out = [HEAD.format(n=rows[0]["n"]), f"| concept | detector | {' | '.join(columns)} | AUC | agreement | time |"]
    out.append("|---" * (len(columns) + 5) + "|")
    for each in rows:
        for name in ("self", "attribute"):
            cells = [each[name][column] for column in columns]
            time_of = f"{100 * each[name]['time']:.0f} %" if name == "self" else ""
            agreement = each["agreement"] if name == "self" else ""
            ends = f"{each[name]['AUC']:.4f} | {agreement} | {time_of}"
            out.append(f"| {each['concept']} → {each['anchor']} | {name} | {' | '.join(cells)} | {ends} |")
    names = list(rows[0]["by timesteps"])
    out += [
        "",
        "AUC by timestep (fraction of the schedule; 6 passes an image for each), on 200 images of each kind:",
        "",
    ]
    out += [f"| concept | {' | '.join(names)} | which it chose |", "|---" * (len(names) + 2) + "|"]
    for each in rows:
        cells = [f"{each['by timesteps'][name]['AUC']:.3f}" for name in names]
        out.append(f"| {each['concept']} | {' | '.join(cells)} | {', '.join(map(str, each['timesteps']))} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    parser.add_argument("--choices", nargs="*", default=list(CONCEPTS), help="concepts of the second part")
    given = parser.parse_args()
    model = salun.load("shapes", device="cpu")
    rows, made = [], []
    for concept in given.concepts:
        rows.append(stored(RESULTS / f"{concept}-{given.n}.json", lambda of=concept: row(model, of, given.n)))
        TABLE.write_text(table(rows), encoding="utf-8")
    for concept in given.choices:
        made.append(stored(RESULTS / f"{concept}-choices.json", lambda of=concept: choices(model, of)))
        TABLE.write_text(table(rows) + choices_table(made), encoding="utf-8")


if __name__ == "__main__":
    main()
