"""Did it work, and what did it cost? An erased model judged against its original at equal prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from salun.evaluation.detector import AttributeClassifier, Reading
from salun.evaluation.metrics import Share, frechet_distance


@dataclass(frozen=True)
class Sides:
    """What a detector read on one model: forget prompts and retain prompts, in the order of the labels."""

    forget: Reading
    retain: Reading


@dataclass(frozen=True)
class Asked:
    """What the prompts asked for: attribute → value indices, (n,) each, for the forget and the retain prompts.

    attribute: the concept's. value: the concept's index in it. anchor: the anchor's, or None for the empty prompt.
    """

    forget: dict[str, np.ndarray]
    retain: dict[str, np.ndarray]
    attribute: str
    value: int
    anchor: int | None


def labels_of(detector: AttributeClassifier, prompts: Sequence[Any]) -> dict[str, np.ndarray]:
    """Attribute → indices (n,) of what each prompt (with `labels`) asks for."""
    return {
        name: np.array([values.index(p.labels[name]) for p in prompts], np.int64)
        for name, values in detector.attributes.items()
    }


def judge(detector: AttributeClassifier, asked: Asked, before: Sides, after: Sides) -> dict[str, Any]:
    """The figures of `run.json`'s `metrics`, in percent.

    ua: share of erased forget pictures in which the concept is not seen. anchor: the anchor is seen instead. kept: each
    other attribute is still what the prompt said, and `all` of them together. none: the picture is none. Each with
    `before`. ra: mean over attributes of the share of retain pictures that show what was asked; by attribute and per
    class. A picture that is none shows nothing: it counts as forgotten in ua, and against anchor, kept and ra.
    """
    others = [name for name in detector.attributes if name != asked.attribute]
    values = detector.attributes

    def forget_side(reading: Reading) -> dict[str, Any]:
        seen = reading.labels[asked.attribute]
        right = {name: reading.labels[name] == asked.forget[name] for name in others}
        found: dict[str, Any] = {
            "forgotten": Share.of(seen != asked.value).json(),
            "none": Share.of(seen == -1).json(),
            "kept": {name: Share.of(hits).json() for name, hits in right.items()},
            "anchor": Share.of(seen == asked.anchor).json() if asked.anchor is not None else None,
        }
        if right:
            found["kept"]["all"] = Share.of(np.logical_and.reduce(list(right.values()))).json()
        return found

    def hits(reading: Reading) -> dict[str, np.ndarray]:
        return {name: reading.labels[name] == asked.retain[name] for name in values}

    was, now = hits(before.retain), hits(after.retain)
    erased, original = forget_side(after.forget), forget_side(before.forget)
    metrics: dict[str, Any] = {
        "ua": erased["forgotten"],
        "ua_before": original["forgotten"],
        "anchor": erased["anchor"],
        "anchor_before": original["anchor"],
        "kept": erased["kept"],
        "kept_before": original["kept"],
        "none": erased["none"],
        "none_before": original["none"],
        "ra_before": Share.of(np.concatenate(list(was.values()))).json(),
        "ra_after": Share.of(np.concatenate(list(now.values()))).json(),
        "ra_by_attribute": {
            name: {"before": Share.of(was[name]).json(), "after": Share.of(now[name]).json()} for name in values
        },
        "per_class": {
            f"{name}: {value}": {
                "before": Share.of(was[name][asked.retain[name] == i]).json(),
                "after": Share.of(now[name][asked.retain[name] == i]).json(),
            }
            for name in values
            for i, value in enumerate(values[name])
            if np.any(asked.retain[name] == i)
        },
        "frechet": frechet(before.retain.features, after.retain.features),
    }
    if asked.anchor is None:
        metrics["anchor_reason"] = "the anchor is the empty prompt, which no detector can name"
    return metrics


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
