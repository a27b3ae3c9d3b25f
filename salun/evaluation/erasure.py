"""Did it work, and what did it cost? An erased model judged against its original at equal prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from salun.evaluation.detector import AttributeClassifier, Reading
from salun.evaluation.metrics import Proportion, frechet_distance


@dataclass(frozen=True)
class Sides:
    """What a detector read on one model: forget prompts and retain prompts, in the order of the labels."""

    forget: Reading
    retain: Reading


@dataclass(frozen=True)
class Target:
    """One concept: its place in the detector's attributes, and the rows of the forget prompts that ask for it.

    value: its index in `attribute`. anchor: the anchor's, or None for the empty prompt.
    """

    name: str
    attribute: str
    value: int
    anchor: int | None
    rows: slice


@dataclass(frozen=True)
class Asked:
    """What pictures should show: attribute → value indices, (n,) each.

    forget: once the concepts are gone (−1 where nothing is asked). retain: as prompted. targets: the concepts.
    """

    forget: dict[str, np.ndarray]
    retain: dict[str, np.ndarray]
    targets: list[Target]


def labels_of(detector: AttributeClassifier, prompts: Sequence[Any]) -> dict[str, np.ndarray]:
    """Attribute → indices (n,) of what each prompt (with `labels`) asks for, −1 where it asks for nothing."""
    return {
        name: np.array([values.index(p.labels[name]) if name in p.labels else -1 for p in prompts], np.int64)
        for name, values in detector.attributes.items()
    }


def judge(detector: AttributeClassifier, asked: Asked, before: Sides, after: Sides) -> dict[str, Any]:
    """The figures of `run.json`'s `metrics`, in percent.

    ua: share of erased forget pictures in which their concept is not seen. anchor: its anchor is seen instead. kept:
    each other attribute is as it should be, and `all` of them together. none: the picture is none. Each with `before`,
    over all concepts together and, under `per_concept`, for each. ra: mean over attributes of the share of retain
    pictures that show what was asked; by attribute and per class. A picture that is none shows nothing: it counts as
    forgotten in ua, and against anchor, kept and ra.
    """
    values = detector.attributes
    each = {target.name: _forget_figures(list(values), asked, [target], before, after) for target in asked.targets}
    metrics = _forget_figures(list(values), asked, asked.targets, before, after)
    was, now = ({name: side.retain.labels[name] == asked.retain[name] for name in values} for side in (before, after))
    metrics |= {
        "per_concept": each,
        "ra_before": Proportion.of(np.concatenate(list(was.values()))).json(),
        "ra_after": Proportion.of(np.concatenate(list(now.values()))).json(),
        "ra_by_attribute": {
            name: {"before": Proportion.of(was[name]).json(), "after": Proportion.of(now[name]).json()}
            for name in values
        },
        "per_class": {
            f"{name}: {value}": {
                "before": Proportion.of(was[name][asked.retain[name] == i]).json(),
                "after": Proportion.of(now[name][asked.retain[name] == i]).json(),
            }
            for name in values
            for i, value in enumerate(values[name])
            if np.any(asked.retain[name] == i)
        },
        "frechet": frechet(before.retain.features, after.retain.features),
    }
    if metrics["anchor"] is None:
        metrics["anchor_reason"] = "an anchor is the empty prompt, which no detector can name"
    return metrics


def _forget_figures(
    attributes: list[str], asked: Asked, targets: Sequence[Target], before: Sides, after: Sides
) -> dict[str, Any]:
    """ua, anchor, kept and none of the forget pictures of these concepts, before and after."""
    found: dict[str, Any] = {}
    for suffix, reading in (("", after.forget), ("_before", before.forget)):
        forgotten, anchored, none = [], [], []
        hits: dict[str, list[np.ndarray]] = {}
        for target in targets:
            seen = reading.labels[target.attribute][target.rows]
            forgotten.append(seen != target.value)
            none.append(seen == -1)
            anchored.append(seen == target.anchor)
            others = [name for name in attributes if name != target.attribute]
            right = {name: reading.labels[name][target.rows] == asked.forget[name][target.rows] for name in others}
            if others:
                right["all"] = np.logical_and.reduce(list(right.values()))
            for name, hit in right.items():
                hits.setdefault(name, []).append(hit)
        known = all(target.anchor is not None for target in targets)
        found["ua" + suffix] = Proportion.of(np.concatenate(forgotten)).json()
        found["anchor" + suffix] = Proportion.of(np.concatenate(anchored)).json() if known else None
        found["none" + suffix] = Proportion.of(np.concatenate(none)).json()
        found["kept" + suffix] = {name: Proportion.of(np.concatenate(parts)).json() for name, parts in hits.items()}
    return found


def frechet(base: np.ndarray, erased: np.ndarray) -> dict[str, Any]:
    """Fréchet distance of detector features on retain pictures, first half of the base against second halves.

    `base` is the noise floor: base against base at the same counts. `erased` lies above it by what the erasure changed.
    """
    half = len(base) // 2
    if half < 2:
        return {"base": None, "erased": None, "n": half, "reason": "too few pictures for a Fréchet distance"}
    return {
        "base": frechet_distance(base[:half], base[half:]),
        "erased": frechet_distance(base[:half], erased[half:]),
        "n": half,
        "features": base.shape[1],
    }
