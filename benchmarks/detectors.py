"""The original model as detector (`self`) beside the attribute classifier and the drawn truth, on `shapes`.

    python benchmarks/detectors.py [--n 500] [--concepts circle star ...]

For each concept: n images each of its prompts, of other prompts and of the erased model, and n drawings of known
content, encoded by the VAE. Prints, and writes `docs/detectors.md` after each concept: misses and false alarms with
95 % intervals, the agreement of both detectors, the time of a detection relative to sampling the same images, and how
the AUC falls with fewer timesteps. Results are kept in `benchmarks/results/detectors`, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import salun
from salun.diffusion.data.latents import decode_images, item_seed, sample_latents
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan, spread
from salun.evaluation.calibration import auc
from salun.evaluation.detector import DetectorInputs, Samples, load_detector
from salun.evaluation.detectors import self_classifier
from salun.evaluation.estimate import Estimate
from salun.progress import silent
from tools.shapes import world

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "detectors", ROOT / "docs" / "detectors.md"
CONCEPTS = ("circle", "star", "red", "blue", "night", "sketch")  # two of each attribute
SEED = 101
HEAD = """# The original model as detector

Written by `benchmarks/detectors.py` on the embedded model: {n} images of each kind, on a CPU. `self` compares the
original network's denoising errors under the prompts “concept”, “anchor” and the empty one, at 2 timesteps, and at 4
where these disagree. Detections are those at the detectors' own fixed thresholds; an erasure lets `self` choose another
one on the original's images, which helps where the AUC is high. Intervals are 95 %.

- Misses: images of the concept's prompts by the original model in which the detector does not see the concept.
- False alarms: likewise in images of other prompts.
- Drawn: the same on drawings of known content, encoded by the VAE.
- After: images of the concept's prompts by the erased model in which the detector sees it.
- Agreement: images of both models on which `self` and the attribute classifier agree.
- Time: of a detection by `self`, relative to sampling the same images.
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
    run = salun.erase(model, concept, eval_images=0, progress=silent)
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
        seen = [detector.detect(part) for part in (before, other, after)]
        taken = time.perf_counter() - began
        seen.append(detector.detect(drawings))
        hits = [each.shows(target.attribute, target.label) for each in seen]
        scores = [each.scores[target.attribute][:, target.label] for each in seen]
        shown[name] = hits[:3]
        found[name] = {
            "misses": percentage(~hits[0]),
            "false alarms": percentage(hits[1]),
            "drawn misses": percentage(~hits[3][truth]),
            "drawn false alarms": percentage(hits[3][~truth]),
            "after": percentage(hits[2]),
            "AUC": auc(scores[0], scores[1]),
            "time": taken / sum(seconds),
        }
    found["agreement"] = percentage(np.concatenate(shown["self"]) == np.concatenate(shown["attribute"]))
    found["by timesteps"] = by_timesteps(model, inputs, before, other)
    return found


def by_timesteps(model: Model, inputs: DetectorInputs, before: Samples, other: Samples) -> dict[str, Any]:
    """AUC, misses and false alarms of `self` with a fixed number of timesteps, and passes per image; then adaptive."""
    detector = load_detector("self", inputs)
    target = detector.target(inputs.subjects[0])
    assert target is not None
    fractions, enough = self_classifier.FRACTIONS, self_classifier.ENOUGH
    found = {}
    passes = 0
    predict = model.predict

    def counted(x_t: Any, *arguments: Any) -> Any:
        nonlocal passes
        passes += len(x_t)
        return predict(x_t, *arguments)

    model.predict = counted  # type: ignore[method-assign]
    try:
        for k in (1, 2, 3, 4, None):
            self_classifier.FRACTIONS = fractions[:k] if k else fractions
            self_classifier.ENOUGH = k or enough
            passes = 0
            parts = [detector.detect(each) for each in (before, other)]
            scores = [each.scores[target.attribute][:, target.label] for each in parts]
            found[str(k or "2 to 4")] = {
                "AUC": auc(*scores),
                "misses": float((scores[0] < 0).mean()),
                "false alarms": float((scores[1] >= 0).mean()),
                "passes": passes / (len(before) + len(other)),
            }
    finally:
        self_classifier.FRACTIONS, self_classifier.ENOUGH = fractions, enough
        del model.predict  # type: ignore[attr-defined]
    return found


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
    out += ["", "By the number of timesteps, the mean over these concepts:", ""]
    out += ["| timesteps | passes an image | AUC | misses, % | false alarms, % |", "|---|---|---|---|---|"]
    for k in rows[0]["by timesteps"]:
        means = {key: float(np.mean([r["by timesteps"][k][key] for r in rows])) for key in rows[0]["by timesteps"][k]}
        rates = f"{100 * means['misses']:.1f} | {100 * means['false alarms']:.1f}"
        out.append(f"| {k} | {means['passes']:.1f} | {means['AUC']:.4f} | {rates} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    given = parser.parse_args()
    model = salun.load("shapes", device="cpu")
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for concept in given.concepts:
        path = RESULTS / f"{concept}-{given.n}.json"
        if not path.exists():
            path.write_text(json.dumps(row(model, concept, given.n), indent=1) + "\n", encoding="utf-8")
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(json.dumps(rows[-1]), flush=True)
        TABLE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
