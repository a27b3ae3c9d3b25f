"""What further sets of prompts say of an erasure, from `eval.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import hypot
from typing import Any

from salun.evaluation.estimate import Estimate, from_json

CONCEPT, OTHERS, ANCHOR = "concept", "other prompts", "anchor"  # the sets that every evaluation has
SHOWN = 50.0  # percent of the images of a set that should show the concept no longer
DAMAGE = 5.0  # percentage points, of images that should be as before


def still_shown(data: Mapping[str, Any]) -> str:
    """In which sets that should no longer show a concept it still shows, by the first detector; "" for none."""
    lines = []
    for name, of, rates in _rates(data):
        rate = rates.get(str(of.get("shows"))) or {}
        side = (rate.get("corrected") or {}).get("after") if rate.get("calibrated") else rate.get("after")
        value = from_json(side)
        if isinstance(value, Estimate) and value.value >= SHOWN:
            lines.append(f"it shows in {min(value.value, 100.0):.0f} % of the images of {name}")
    return "; ".join(lines)


def harmed(data: Mapping[str, Any]) -> str:
    """Which sets that should be as before are less often as prompted, more than chance allows; "" for none."""
    lines = []
    for name, of, rates in _rates(data):
        rate = rates.get("as prompted") or {} if of.get("preserve") else {}
        before, after = from_json(rate.get("before")), from_json(rate.get("after"))
        if isinstance(before, Estimate) and isinstance(after, Estimate):
            lost, least = lost_of(before, after)
            if lost >= DAMAGE and least > 0:
                lines.append(f"images of {name} are as prompted in {after.text()} (before: {before.value:.1f} %)")
    return "; ".join(lines)


def lost_of(before: Estimate, after: Estimate) -> tuple[float, float]:
    """How much less a percentage is, in points, and the least that this may be, as if of independent images."""
    lost = before.value - after.value
    return lost, lost - hypot(before.half_width, after.half_width)


def _rates(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(name, set, rates of the first detector) of each set besides the held-out prompts."""
    first = next(iter(data.get("detectors") or {}), None)
    for name, of in (data.get("sets") or {}).items():
        if name not in (CONCEPT, OTHERS):
            yield name, of, of["detected"].get(first) or {}
