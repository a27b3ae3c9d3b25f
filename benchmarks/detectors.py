"""The original model as detector (`self`) beside the attribute classifier and the drawn truth, on `shapes`.

    python -m benchmarks.detectors [--n 500] [--concepts circle star ...]
    python -m benchmarks.detectors --table       write the tables from what is there

For each concept: n images each of its prompts, of other prompts and of the anchor's by the original, n of the first two
by the erased model, all evaluated as `salun eval` does, and n drawings of known content, encoded by the VAE. Writes
`docs/detectors.md` after each concept. Results are kept in `benchmarks/results/detectors`, so an interrupted run
continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import salun
from benchmarks.detectors_page import BY_TIMESTEP, CONCEPTS, held_out, table
from benchmarks.stored import stored
from salun.diffusion.evaluation import EvalPrompts, Evaluation, eval_prompts, evaluate_model, evaluated_pair
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.evaluation.calibration import adjusted, auc, fitting
from salun.evaluation.detector import Detector, DetectorInputs, Samples, Subject, load_detector
from salun.evaluation.detectors.self_classifier import ANY, FRACTIONS, PROMPT, SelfClassifier
from salun.evaluation.estimate import Estimate
from salun.evaluation.metric import EvaluationPair
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache
from tools.shapes import world

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "detectors", ROOT / "docs" / "detectors.md"
SEED = 101
ALTERED = 200  # images of other prompts, of which each is also judged by prompts with one word changed
ATTRIBUTES = {"shape": world.SHAPES, "color": world.COLOURS, "style": world.STYLES}
NONE = (np.inf, -np.inf)  # the range of scores that get a second noise, where none does


class Counted(SelfClassifier):
    """`self`, which counts its passes of the network."""

    def __init__(self, model: Model, subjects: Sequence[Subject]) -> None:
        super().__init__(model, subjects)
        self.passes = {"choosing": 0, "detecting": 0}
        self.doing = "detecting"

    def fit(self, shows: Mapping[str, Samples], others: Samples, progress: Progress = silent) -> None:
        self.doing = "choosing"
        super().fit(shows, others, progress)
        self.doing = "detecting"

    def _at(self, latents: Tensor, encoded: Conditioning, pairs: Tensor, fraction: float, sign: int) -> Tensor:
        self.passes[self.doing] += len(pairs)
        return super()._at(latents, encoded, pairs, fraction, sign)


def percentage(hits: np.ndarray) -> str:
    return Estimate.percentage(hits).text("")


def drawn(model: Model, n: int) -> tuple[Samples, list[world.Scene]]:
    """n drawings of random scenes, encoded."""
    rng = np.random.default_rng(SEED)
    scenes = [world.random_scene(rng, calm=True) for _ in range(n)]
    images = np.stack([world.draw(scene, rng, calm=True) for scene in scenes])
    latents = np.concatenate([model.encode_images(images[i : i + 64]).numpy() for i in range(0, n, 64)])
    return Samples(images, torch.from_numpy(latents), [""] * n), scenes


def inputs_of(model: Model, concept: str, n: int) -> tuple[Plan, EvalPrompts, Evaluation]:
    """Plan, prompts and the original's images of an evaluation; the latter stay in the cache."""
    plan = make_plan(model.settings, "shapes", concept, EraseOptions())
    prompts = eval_prompts(plan, n, SEED)
    cache = Cache.of_user()
    return plan, prompts, evaluate_model(model, prompts, silent, Stage.IMAGES_BEFORE, cache, hold_images=False)


def of_original(model: Model, concept: str, n: int) -> dict[str, Any]:
    """Scores of the original's images, and how they depend on the noises."""
    plan, _, before = inputs_of(model, concept, n)
    detector = SelfClassifier(model, plan.subjects)
    assert before.anchor is not None
    parts = {"concept": before.forget, "others": before.retain, "anchor": before.anchor}
    others = Samples.cat([before.retain, before.anchor])
    on = [np.flatnonzero(fitting(len(each))) for each in (before.forget, others)]
    detector.fit({concept: before.forget[on[0]]}, others[on[1]])
    parts = {kind: replace(part, compare_prompts=False) for kind, part in parts.items()}

    def scores(second: tuple[float, float]) -> dict[str, np.ndarray]:
        detector.open[concept] = second
        return {kind: detector.detect(part).scores[concept][:, 0] for kind, part in parts.items()}

    low, high = detector.open[concept]
    one, both = scores(NONE), scores(ANY)
    undecided = {kind: (of >= low) & (of <= high) for kind, of in one.items()}
    used = {kind: np.where(undecided[kind], both[kind], of) for kind, of in one.items()}
    return {
        "timesteps": detector.timesteps[concept],
        "scores": {kind: " ".join(f"{each:.4f}" for each in of) for kind, of in used.items()},
        "by noise": by_noise(one, used, both),
        "second noise": {kind: 100 * float(of.mean()) for kind, of in undecided.items()},
    }


def of_both(model: Model, concept: str, n: int) -> dict[str, Any]:
    """What `self` and the attribute classifier see in the images of the original and of the erased model."""
    plan, prompts, before = inputs_of(model, concept, n)
    run = salun.erase(model, concept, steps=model.settings.recipe.steps, eval_images=0, progress=silent)
    run.apply()
    after = evaluate_model(model, prompts, hold_images=False)
    run.undo()
    drawings, scenes = drawn(model, n)
    truth = np.array([concept in (s.shape, s.colour, s.style) for s in scenes])
    found: dict[str, Any] = {"anchor": plan.subjects[0].anchor}
    shown: dict[str, np.ndarray] = {}
    inputs = DetectorInputs(plan.subjects, model.settings.detector, model)
    counted = Counted(model, plan.subjects)
    detectors: dict[str, Detector] = {"self": counted, "attribute": load_detector("attribute", inputs)}
    for name, detector in detectors.items():
        pair = evaluated_pair(detector, plan, prompts, before, after)
        if detector is counted:
            found["passes"] = counted.passes | {"sampling": 5 * n * plan.sampling.passes}
        calibration, of = pair.calibration(pair.concepts[0]), pair.concepts[0]
        seen = detector.detect(drawings).scores[of.attribute][:, of.label] >= calibration.threshold
        gone = pair.shown(of)
        others = pair.after.retain.scores[of.attribute][:, of.label] >= calibration.threshold
        shown[name] = np.concatenate([*scores_of(pair).values()]) >= calibration.threshold
        shown[name] = np.concatenate([shown[name], gone, others])
        found[name] = {
            "misses": percentage(~calibration.positives),
            "false alarms": percentage(calibration.negatives),
            "drawn misses": percentage(~seen[truth]),
            "drawn false alarms": percentage(seen[~truth]),
            "after": percentage(gone),
            "as prompted": as_prompted(pair),
            "AUC": calibration.auc,
            "threshold": calibration.threshold,
        }
    found["agreement"] = percentage(shown["self"] == shown["attribute"])
    found["by timestep"] = by_timestep(counted, concept, before)
    found["accepted"] = accepted(counted, before.retain[:ALTERED])
    return found


def accepted(detector: SelfClassifier, others: Samples) -> dict[str, float]:
    """Percent of the original's images that are "as prompted" by their own prompt, and with one word changed."""
    rng, prompts = np.random.default_rng(SEED), {"none": list(others.prompts)}
    for name, values in ATTRIBUTES.items():
        prompts[name] = [altered(prompt, list(values), rng) for prompt in others.prompts]
    seen = {name: detector.detect(replace(others, prompts=each)) for name, each in prompts.items()}
    return {name: 100 * float(of.shows(PROMPT, 0).mean()) for name, of in seen.items()}


def altered(prompt: str, values: Sequence[str], rng: np.random.Generator) -> str:
    """The prompt with the one word of it that is among these values replaced by another of them."""
    (word,) = set(values) & set(prompt.replace(",", " ").split())
    return prompt.replace(word, rng.choice([each for each in values if each != word]))


def scores_of(pair: EvaluationPair) -> dict[str, np.ndarray]:
    """The concept's scores (n,) in the original's images of its prompts, of others and of the anchor's."""
    concept, before = pair.concepts[0], pair.before
    assert before.anchor is not None
    parts = {"concept": before.forget, "others": before.retain, "anchor": before.anchor}
    return {kind: part.scores[concept.attribute][:, concept.label] for kind, part in parts.items()}


def as_prompted(pair: EvaluationPair) -> str:
    """In which part of the images of other prompts all is as prompted, by the original and by the erased model."""
    sides = (pair.before.retain, pair.after.retain)
    if PROMPT in pair.before.retain.scores:
        rights = [side.shows(PROMPT, 0) for side in sides]
    else:
        rights = [np.logical_and.reduce([side.shows(k, v) for k, v in pair.expected_retain.items()]) for side in sides]
    return " → ".join(f"{100 * right.mean():.1f}" for right in rights)


def chosen_on(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the images that chose."""
    shown = scores["concept"]
    others = np.concatenate([scores["others"], scores["anchor"]])
    return shown[fitting(len(shown))], others[fitting(len(others))]


def errors_of(scores: Mapping[str, np.ndarray], threshold: float | None = None) -> dict[str, Any]:
    """AUC, and misses and false alarms in percent, with a threshold chosen on other images or the given one."""
    shown, others = held_out(scores)
    threshold = adjusted(*chosen_on(scores), 0.0) if threshold is None else threshold
    wrong = (shown < threshold).mean(), (others >= threshold).mean()
    return {"AUC": auc(shown, others), "errors": " / ".join(f"{100 * each:.1f}" for each in wrong)}


def by_noise(
    one: Mapping[str, np.ndarray], used: Mapping[str, np.ndarray], both: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Errors of scores by ε alone, as `self` makes them, and with −ε for all images."""
    threshold = adjusted(*chosen_on(used), 0.0)
    same = [((used[kind] >= threshold) == (both[kind] >= threshold)).mean() for kind in used]
    return {
        "ε": errors_of(one),
        "ε, −ε where needed": errors_of(used),
        "ε and −ε": errors_of(both),
        "largest score": errors_of(used, 0.0),
        "changed": 100 - 100 * float(np.mean(same)),
    }


def by_timestep(detector: Counted, concept: str, before: Evaluation) -> dict[str, float]:
    """AUC of `self` on some images of each kind at each timestep alone, and at all of them, with one noise."""
    assert before.anchor is not None
    usual, chosen, made = detector.open[concept], detector.timesteps[concept], {}
    half = BY_TIMESTEP // 2
    parts = [before.forget[:BY_TIMESTEP], Samples.cat([before.retain[:half], before.anchor[:half]])]
    detector.open[concept] = NONE
    for name, timesteps in ({str(t): (t,) for t in FRACTIONS} | {"all": FRACTIONS}).items():
        detector.timesteps[concept] = timesteps
        made[name] = auc(*(detector.detect(each).scores[concept][:, 0] for each in parts))
    detector.timesteps[concept], detector.open[concept] = chosen, usual
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    model = None if given.table else salun.load("shapes", device="cpu")
    parts: dict[str, Callable[[Model, str, int], dict[str, Any]]] = {"original": of_original, "both": of_both}
    made: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for name, measure in parts.items():
        for concept in given.concepts:
            path, facts = RESULTS / f"{concept}-{name}-{given.n}.json", {"concept": concept, "n": given.n}
            if model is not None:
                stored(path, lambda of=concept, by=measure: by(model, of, given.n))
            if path.exists():
                made[name][concept] = facts | json.loads(path.read_text(encoding="utf-8"))
            if made["original"]:
                pairs = [made["original"][each] | of for each, of in made["both"].items() if each in made["original"]]
                TABLE.write_text(table(list(made["original"].values()), pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
