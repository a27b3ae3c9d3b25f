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
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import salun
from benchmarks.stored import stored
from salun.diffusion.evaluation import EvalPrompts, Evaluation, eval_prompts, evaluate_model, evaluated_pair
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.evaluation.calibration import Calibration, adjusted, auc, fitting, fitting_rounds
from salun.evaluation.detector import Detector, DetectorInputs, Samples, Subject, load_detector
from salun.evaluation.detectors.self_classifier import ANY, FRACTIONS, PROMPT, SelfClassifier
from salun.evaluation.estimate import Estimate
from salun.evaluation.metric import EvaluationPair
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache
from tools.shapes import world

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "detectors", ROOT / "docs" / "detectors.md"
CONCEPTS = ("red", "circle", "night", "blue", "star", "sketch")  # two of each attribute
SMALL = (100, 16)  # images of each kind of smaller evaluations, whose cost is told too
BY_TIMESTEP = 200  # images of each kind by which the timesteps are compared
PROPORTIONS = (0.0, 0.1, 0.5, 1.0)  # of the concept, in mixtures of `JUDGED` images; `DRAWS` of each
JUDGED, DRAWS = 100, 400
SEED = 101
GOAL = 30  # percent of the time of sampling
NONE = (np.inf, -np.inf)  # the range of scores that get a second noise, where none does
HEAD = """Written by `benchmarks/detectors.py` on the bundled model: {n} images of each kind, on a CPU. Everything is as
in `salun eval`: `self` compares the original network's denoising errors under the prompts “concept”, “anchor” and the
empty one, for one noise ε, at timesteps that it chose on 24 of the original's images of each kind; where −ε could
change the decision, it is added. Where that is, and the threshold, are chosen on {fitted} images, these among them.
None of the {fitted} is counted here, so no choice was made on the images that give the misses and false alarms.
Intervals are 95 %.

- Misses: images of the concept's prompts by the original model in which the detector does not see the concept.
- False alarms: likewise in images of other prompts and of the anchor's.
- Drawn: the same on drawings of known content, encoded by the VAE.
- After: images of the concept's prompts by the erased model in which the detector sees it.
- As prompted: images of other prompts, by the original and by the erased model, that show what their prompt says:
  `self` compares the prompt with the empty one, `attribute` wants shape, color and style to be right.
- Agreement: all images of both models on which `self` and the attribute classifier agree.
"""


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
    return found


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


def held_out(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the concept's images and of others, without those that chose."""
    shown = scores["concept"]
    others = np.concatenate([scores["others"], scores["anchor"]])
    return shown[~fitting(len(shown))], others[~fitting(len(others))]


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


def mixture(scores: Mapping[str, np.ndarray], proportion: float) -> str:
    """What the calibration makes of mixtures of known proportion: percent of `JUDGED` images that show the concept.

    Images that chose nothing are halved at random: one half calibrates (some of it choose the threshold), and from the
    other one the mixture is drawn.

    Returns:
        Mean corrected percentage ± its standard error; the mean raw percentage; coverage of the 95 % intervals.
    """
    rng, values, raw, covered = np.random.default_rng(3), [], [], 0
    known = round(JUDGED * proportion)
    for _ in range(DRAWS):
        parts = [np.split(rng.permutation(each), [len(each) // 2]) for each in held_out(scores)]
        calibration = Calibration.of_fitted(parts[0][0], parts[1][0], 0.0)
        judged = np.concatenate([parts[0][1][:known], parts[1][1][: JUDGED - known]]) >= calibration.threshold
        value = calibration.corrected(judged)
        assert isinstance(value, Estimate) and value.low is not None and value.high is not None
        values.append(100 - value.value)
        raw.append(100 * judged.mean())
        covered += value.low <= 100 * (1 - proportion) + 1e-6 and value.high >= 100 * (1 - proportion) - 1e-6
    error = np.std(values) / np.sqrt(DRAWS)
    return f"{np.mean(values):.1f} ± {error:.1f}; {np.mean(raw):.1f}; {100 * covered / DRAWS:.0f}"


def read(scores: Mapping[str, str]) -> dict[str, np.ndarray]:
    """As stored."""
    return {kind: np.array(text.split(), np.float32) for kind, text in scores.items()}


def cells(first: str, each: Sequence[object]) -> str:
    return f"| {' | '.join([first, *map(str, each)])} |"


def header(*columns: object) -> list[str]:
    return [cells(str(columns[0]), columns[1:]), "|---" * len(columns) + "|"]


def main_table(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("misses", "false alarms", "drawn misses", "drawn false alarms", "after", "as prompted")
    out = header("concept", "detector", *columns, "AUC", "agreement")
    for each in rows:
        for name in ("self", "attribute"):
            ends = f"{each[name]['AUC']:.4f}", each["agreement"] if name == "self" else ""
            of = f"{each['concept']} → {each['anchor']}"
            out.append(cells(of, [name, *(each[name][column] for column in columns), *ends]))
    return out


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    n = rows[0]["n"]
    out = [
        "",
        "## Cost",
        "",
        f"The goal is at most {GOAL} % of the time of sampling the images that are judged, n of each of five kinds.",
        "Counted in passes of the network, not timed, with everything that `salun eval` asks of `self`: for images of",
        "other prompts that includes whether they are as prompted. It chooses on a fifth of the images, 24 to 100 of",
        "each kind but at most half, so that few images cost more each; smaller n than the first are computed.",
        "Sampling takes 24 passes an image here (12 steps with guidance); with 50 steps it is a quarter of these.",
        "",
        *header("concept", "passes of choosing", "passes an image", *(f"n = {images}" for images in (n, *SMALL))),
    ]
    for each in rows:
        passes = each["passes"]["choosing"], f"{each['passes']['detecting'] / (5 * n):.1f}"
        out.append(cells(each["concept"], [*passes, *(f"{cost:.1f} %" for cost in costs(each, n))]))
    return out


def timestep_table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["by timestep"])
    out = [
        "",
        "## Timesteps",
        "",
        f"AUC by timestep, as a fraction of the schedule, with one noise, on {BY_TIMESTEP} images of the concept and",
        f"{BY_TIMESTEP} others:",
        "",
        *header("concept", *names, "which it chose"),
    ]
    for each in rows:
        values = [f"{each['by timestep'][name]:.3f}" for name in names]
        out.append(cells(each["concept"], [*values, ", ".join(map(str, each["timesteps"]))]))
    return out


def noise_table(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name, of in rows[0]["by noise"].items() if isinstance(of, dict)]
    out = [
        "",
        "## Noises and thresholds",
        "",
        "AUC, and misses / false alarms in percent, on the images that chose nothing: by one noise, as `self` does",
        "it, with −ε for all images, and without a chosen threshold. Second noise: percent of the images of the",
        "concept / of other prompts / of the anchor that get −ε. Changed: percent of the decisions that −ε for all",
        "would change.",
        "",
        *header("concept", *names, "second noise", "changed"),
    ]
    for each in rows:
        of = each["by noise"]
        values = [f"{of[name]['AUC']:.4f}: {of[name]['errors']}" for name in names]
        second = " / ".join(f"{each['second noise'][kind]:.0f}" for kind in ("concept", "others", "anchor"))
        out.append(cells(each["concept"], [*values, second, f"{of['changed']:.1f}"]))
    return out


def mixtures_of(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Concept → `mixture` of each of `PROPORTIONS`."""
    return {each["concept"]: [mixture(read(each["scores"]), of) for of in PROPORTIONS] for each in rows}


def mixture_table(mixtures: Mapping[str, list[str]]) -> list[str]:
    out = [
        "",
        "## Mixtures of known proportion",
        "",
        f"Percent of {JUDGED} images that show the concept, as corrected by the calibration on other images, before it",
        f"is cut off at 0 and 100 %: mean of {DRAWS} draws from the same images ± its standard error; the mean raw",
        "percentage; and in how many percent of the draws the 95 % interval holds the true one. Threshold, rates and",
        "mixture are each of images of their own.",
        "",
        *header("concept", *(f"{100 * proportion:.0f} %" for proportion in PROPORTIONS)),
    ]
    return [*out, *(cells(concept, each) for concept, each in mixtures.items())]


def costs(each: Mapping[str, Any], n: int) -> list[float]:
    """Percent of the cost of sampling, of evaluations with n and with each of `SMALL` images of each kind."""
    of, chosen = each["passes"], len(each["timesteps"])
    assert of["choosing"] == choosing(n, chosen)
    return [
        100 * (choosing(images, chosen) / (images / n) + of["detecting"]) / of["sampling"] for images in (n, *SMALL)
    ]


def choosing(n: int, chosen: int) -> int:
    """Passes of choosing, of n images of each kind: three prompts at all timesteps, at two, and at the chosen ones."""
    rounds = fitting_rounds(int(fitting(n).sum()), int(fitting(2 * n).sum()))
    at = [len(FRACTIONS)] * 2 + [2] * 2 + [chosen] * (len(rounds) - 4)
    return sum(3 * images * timesteps for images, timesteps in zip(rounds, at, strict=True))


def summary(pairs: list[dict[str, Any]], mixtures: Mapping[str, list[str]]) -> str:
    """The first paragraph."""
    off = max(
        abs(float(mean.split()[0]) - 100 * of)
        for each in mixtures.values()
        for mean, of in zip(each, PROPORTIONS, strict=True)
    )
    n = pairs[0]["n"]
    misses, false = ([float(each["self"][name].split()[0]) for each in pairs] for name in ("misses", "false alarms"))
    drawn = max(float(each["self"]["drawn misses"].split()[0]) for each in pairs)
    made = list(zip(*(costs(each, n) for each in pairs), strict=True))
    spent = [
        f"{min(of):.0f} to {max(of):.0f} % with {images} images of each kind ({sum(each > GOAL for each in of)} of "
        f"{len(of)} concepts miss the goal of {GOAL} %)"
        for images, of in zip((n, *SMALL), made, strict=True)
    ]
    text = (
        f"**What it shows.** The original model, as its own detector, misses {min(misses):.1f} to {max(misses):.1f} % "
        f"of the images of a concept (of drawings up to {drawn:.1f} %) and raises a false alarm in at most "
        f"{max(false):.1f} % of others; the AUC is {min(each['self']['AUC'] for each in pairs):.3f} or more. "
        f"Percentages of mixtures, corrected by its calibration, are at most {off:.1f} points off on average. "
        f"Of the cost of sampling it takes {'; '.join(spent)}."
    )
    return "\n".join(textwrap.wrap(text, 118, break_long_words=False))


def table(originals: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    """docs/detectors.md, of the concepts that were measured."""
    missing = [name for name in CONCEPTS if name not in [each["concept"] for each in pairs]]
    mixtures = mixtures_of(originals)
    lines = ["# The original model as detector", "", *([summary(pairs, mixtures), ""] if pairs else [])]
    lines.append(HEAD.format(n=originals[0]["n"], fitted=int(fitting(originals[0]["n"]).sum())))
    if missing:
        lines += [f"**The erased model has not been measured yet for {', '.join(missing)}.**", ""]
    if pairs:
        lines += [*main_table(pairs), *cost_table(pairs), *timestep_table(pairs)]
    return "\n".join([*lines, *noise_table(originals), *mixture_table(mixtures)]) + "\n"


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
