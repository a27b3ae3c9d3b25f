"""The page of `benchmarks/detectors.py`: tables and the paragraph before them, from stored results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from salun.detectors import DETECTORS
from salun.evaluation.calibration import Calibration, fitting, fitting_passes
from salun.evaluation.estimate import Estimate

CONCEPTS = ("red", "circle", "night", "blue", "star", "sketch")  # two of each attribute
SMALL = (100, 16)  # images of each kind of smaller evaluations, whose cost is in the table too
BY_TIMESTEP = 200  # images of each kind by which the timesteps are compared
PROPORTIONS = (0.0, 0.1, 0.5, 1.0)  # of the concept, in mixtures of `JUDGED` images; `DRAWS` of each
JUDGED, DRAWS = 100, 400
GOAL = 30  # percent of the time of sampling
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
  `self` wants the prompt to be better than the empty one at each of three timesteps, `attribute` wants shape, color and
  style to be right.
- Agreement: all images of both models on which `self` and the attribute classifier agree.
"""


def held_out(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the concept's images and of others, without those that chose."""
    shown = scores["concept"]
    others = np.concatenate([scores["others"], scores["anchor"]])
    return shown[~fitting(len(shown))], others[~fitting(len(others))]


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


def prompt_table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["accepted"])
    out = [
        "",
        "## One word of a prompt",
        "",
        "Percent of the original's images of other prompts that `self` takes to be as prompted: by their own prompt,",
        "and by one in which a single word is another.",
        "",
        *header("evaluation of", *(f"word changed: {name}" for name in names)),
    ]
    return [*out, *(cells(each["concept"], [f"{each['accepted'][name]:.1f}" for name in names]) for each in rows)]


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
    """Passes of choosing, of n images of each kind. chosen: timesteps."""
    *rounds, best = DETECTORS["self"].fitting_passes
    return fitting_passes(int(fitting(n).sum()), int(fitting(2 * n).sum()), (*rounds, best * chosen))


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
        lines += [*main_table(pairs), *cost_table(pairs), *timestep_table(pairs), *prompt_table(pairs)]
    return "\n".join([*lines, *noise_table(originals), *mixture_table(mixtures)]) + "\n"
