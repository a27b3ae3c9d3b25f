"""The page of `benchmarks/classes.py`: its tables and the paragraph before them, from stored results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from salun.evaluation.estimate import Estimate
from salun.evaluation.interval import interval

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method → the results of its runs."""
PAIRS = [(masked, f"{masked}, {control}") for masked in ("SalUn", "the authors' losses")
         for control in ("random mask", "all weights")]  # fmt: skip
MEASURES = {"ua": ("UA", True), "others": ("the others right", True), "frechet": ("Fréchet distance", False)}
"""Of a result: its title, and whether more of it is better."""
ERASED, HARM, NEAR = 99.0, 0.5, 1.0  # UA in percent; points of accuracy on other classes; Fréchet distance
HEAD = """Written by `benchmarks/classes.py` on the bundled class-conditional model `digits`
([card](../salun/assets/digits)), on a CPU: {n} samples of the forgotten class, {others} of each other one. Each method
takes the steps of the model's recipe, at the same learning rate; the anchor is the next digit. A run is one of a class
and a seed: {runs}.

“The authors' losses”: the forget target is that of the model in training, the retain target is the noise, and no anchor
samples are learned, as in the authors' code; their learning rate, steps and α are not taken. A mask has half of the
weights, by saliency unless the row says otherwise. UA: samples under the forgotten label that do not show the class, ±
the standard deviation over runs, the lowest run in parentheses; of {n} samples, 100 % has a 95 % interval down to
{lower:.1f} %. Others: samples of the other classes that show theirs; “worst”: of the class where that fell most.
Fréchet distances are of the detector's features, of samples of the other classes: to those of the original model, and
of all classes to those of Retrain, a model that was trained without the class ({gold}). “Labels to Retrain”: total
variation between the classes that are seen under the forgotten label and those that Retrain shows there. Seconds: the
processor's, of the mask and the training, without samples.
"""
PAIRED = """Runs of the same class and seed, the saliency mask minus the other: mean difference with its 95 % interval
by Student's t. Classes of one model are no independent draws, so an interval is of these classes and seeds."""


def document(rows: Rows, n: int, others: int) -> str:
    """The whole page.

    Args:
        n: Samples of the forgotten class. others: Of each other one.
    """
    with_retrain = [each for found in rows.values() for each in found if "retrain_others" in each]
    gold = "there is none"
    if with_retrain:
        classes = ", ".join(str(label) for label in sorted({each["class"] for each in with_retrain}))
        right = np.mean([each["retrain_others"] for each in with_retrain])
        gold = f"there is one for class {classes} alone, with {right:.1f} % of the others right"
    runs = ", ".join(f"{len(found)} of {name}" for name, found in rows.items())
    if len({len(found) for found in rows.values()}) == 1:
        runs = f"{len(next(iter(rows.values())))} of each method"
    lower = Estimate.percentage(np.ones(n, bool)).low
    head = HEAD.format(n=n, others=others, runs=runs, gold=gold, lower=lower)
    return "\n\n".join([
        "# Forgetting classes", _filled(summary(rows)), *map(_filled, head.strip().split("\n\n")), table(rows),
        "## Masks, in pairs", _filled(PAIRED), paired(rows) + "\n",
    ])  # fmt: skip


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def summary(rows: Rows) -> str:
    """What the numbers show, in sentences whose figures come from them."""
    ua = {name: _mean(found, "ua") for name, found in rows.items()}
    weak = [f"{_quoted(name)} ({value:.1f} %)" for name, value in ua.items() if value < ERASED]
    lost = {name: _mean(found, "others_before") - _mean(found, "others") for name, found in rows.items()}
    harmed = [f"{_quoted(name)} (by {drop:.1f} points)" for name, drop in lost.items() if drop >= HARM]
    erased = (
        f"UA is below {ERASED:.0f} % with {_and(weak)}" if weak else f"UA is at least {ERASED:.0f} % with every method"
    )
    return " ".join([
        f"**What it shows.** {erased}; accuracy on the others falls by {HARM} points or more with "
        f"{_and(harmed) if harmed else 'none'}.",
        *_masks(rows), *_distances(rows), *_retrain(rows),
    ])  # fmt: skip


def _masks(rows: Rows) -> list[str]:
    """What the pairs say of masks: where the interval of a difference leaves out 0, and which side that favors."""
    said = []
    for masked, control in PAIRS:
        better, worse = list[str](), list[str]()
        for key, (title, more) in MEASURES.items():
            found = interval(differences(rows, masked, control, key))
            if found["low"] is not None and (found["low"] > 0 or found["high"] < 0):
                side = better if (found["mean"] > 0) == more else worse
                side.append(f"{title} ({found['mean']:+.2f})")
        sides = [f"{word} in {_and(titles)}" for word, titles in (("better", better), ("worse", worse)) if titles]
        if differences(rows, masked, control, "ua"):
            losses = "SalUn's" if masked == "SalUn" else "the authors'"
            beside = {"random mask": "a random one", "all weights": "training all weights"}[control.split(", ")[1]]
            verdict = f"is {_and(sides)} than" if sides else "cannot be distinguished from"
            said.append(f"With {losses} losses the saliency mask {verdict} {beside}.")
    return said


def differences(rows: Rows, one: str, other: str, key: str) -> list[float]:
    """Of the runs that both have, `one` minus `other`."""
    first, second = ({(each["class"], each["seed"]): _value(each, key) for each in rows.get(name, ())}
                     for name in (one, other))  # fmt: skip
    return [first[run] - second[run] for run in first if run in second]


def _distances(rows: Rows) -> list[str]:
    """What the Fréchet distances show."""
    far = {name: _mean(found, "frechet") for name, found in rows.items()}
    near, moved = ([name for name in far if (far[name] < NEAR) == small] for small in (True, False))
    if not (near and moved):
        return []
    return [f"{_and([*map(_quoted, near)])} leave the other digits nearly as they were (Fréchet distance "
            f"{_ends([far[name] for name in near])}), {_and([*map(_quoted, moved)])} move them "
            f"({_ends([far[name] for name in moved])})."]  # fmt: skip


def _retrain(rows: Rows) -> list[str]:
    """How the samples under the forgotten label differ from Retrain's."""
    known = {name: [each["labels_to_retrain"] for each in found if "labels_to_retrain" in each]
             for name, found in rows.items()}  # fmt: skip
    values = [float(np.mean(found)) for found in known.values() if found]
    if not values:
        return []
    return [f"What they draw under the forgotten label is not what Retrain draws there (total variation "
            f"{_ends(values, 2)} of 1)."]  # fmt: skip


def table(rows: Rows) -> str:
    """A method a line, means over its runs."""
    lines = [
        "| method | runs | UA, % | the others right, % (before) | worst class | Fréchet to the original | "
        "labels to Retrain | Fréchet to Retrain (original) | mask, % | seconds |",
        "|---" * 10 + "|",
    ]
    for name, found in rows.items():
        ua = [_value(each, "ua") for each in found]
        worst = min((each["worst"] for each in found), key=lambda each: each[1])
        gold = [each for each in found if "frechet_to_retrain" in each]
        labels, far = "–", "–"
        if gold:
            labels = f"{_mean(gold, 'labels_to_retrain'):.2f}"
            far = f"{_mean(gold, 'frechet_to_retrain'):.2f} ({_mean(gold, 'frechet_of_original_to_retrain'):.2f})"
        lines.append(
            f"| {name} | {len(found)} | {np.mean(ua):.1f} ± {np.std(ua):.1f} ({min(ua):.1f}) | "
            f"{_mean(found, 'others'):.1f} ({_mean(found, 'others_before'):.1f}) | {worst[0]}: {worst[1]:+.1f} | "
            f"{_mean(found, 'frechet'):.2f} | {labels} | {far} | {100 * _mean(found, 'selected'):.0f} | "
            f"{_mean(found, 'seconds'):.0f} |"
        )
    return "\n".join(lines)


def paired(rows: Rows) -> str:
    """A pair of masks a line: the difference of each measure."""
    titles = [title + ("" if key == "frechet" else ", points") for key, (title, _) in MEASURES.items()]
    lines = ["| losses | beside | pairs | " + " | ".join(titles) + " |", "|---" * (3 + len(titles)) + "|"]
    for masked, control in PAIRS:
        found = [interval(differences(rows, masked, control, key)) for key in MEASURES]
        if found[0]["n"] >= 2:
            cells = [f"{each['mean']:+.2f} ({each['low']:+.2f} to {each['high']:+.2f})" for each in found]
            losses = "SalUn's" if masked == "SalUn" else masked
            lines.append(f"| {losses} | {control.split(', ')[1]} | {found[0]['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(results: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([_value(each, key) for each in results]))


def _value(result: Mapping[str, Any], key: str) -> float:
    measured = result[key]
    return float(measured["value"] if isinstance(measured, dict) else measured)


def _ends(values: Sequence[float], digits: int = 1) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _quoted(name: str) -> str:
    return f"“{name}”" if "," in name or name[0].islower() else name


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
