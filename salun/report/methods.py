"""The page of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salun.report import charts
from salun.report.render import Report, Section, page

MEANING = (
    "Means ± standard deviations over concepts and seeds. UA: images of the concept's prompts without the concept. "
    "RA: images of other prompts that are as prompted; where no detector can tell that, methods are ranked by UA × (1 "
    "− image drift). The difference is to the first method, on the same concepts and seeds, with its 95 % interval by "
    "Student's t. Seconds: sampling, mask and training on this machine, where samples that several methods share "
    "count for the first of them. Passes: of one sample through the network, for samples, mask and training, as if "
    "nothing was shared; forward and backward count as three. Weights changed: of all weights of the network."
)
ATTACKED = "Means ± standard deviations of the prompts that an attack brings the concept back with, in percent (ASR)."
TRADE_OFF = "Each point is a method, its size the time that it took; the best corner is at the top right."


def comparison_page(
    run: Mapping[str, Any],
    cells: Sequence[Sequence[str]],
    attacks: Sequence[Sequence[str]],
    images: Mapping[str, Mapping[str, bytes]],
) -> Report:
    """The page.

    Args:
        run: As in `run.json`.
        cells: The table as text, its heading first. attacks: Likewise of each attack, empty where none was made.
        images: Concept → title of a method → PNG of its images, before and after.
    """
    table, options = run["metrics"], run["options"]
    sections = [Section("Methods", MEANING, cells)]
    if attacks:
        sections.append(Section("Attacks", ATTACKED, attacks))
    points, kept = _points(table)
    if points:
        sections.append(Section("Trade-off", TRADE_OFF, charts=[charts.scatter(points, "UA, %", kept)]))
    text = "At the first seed: above the original's images, below those of the erased model."
    sections += [Section(f"“{concept}”", text, images=shown) for concept, shown in images.items() if shown]
    title = f"{len(table)} methods, {len(options['concept'])} concepts, {options['seeds']} seeds"
    return page(title, f"{options['model'] or 'shapes'} · on {run['device']}", sections, notes=run["notes"], run=run)


def _points(table: Mapping[str, Any]) -> tuple[dict[str, tuple[float, float, float]], str]:
    """Title of a method → (UA, what is kept, seconds), and what that is: RA; 1 − image drift where none has an RA."""
    known = [row for row in table.values() if row["ua"] and row["ra"]]
    if known:
        points = {row["title"]: (row["ua"]["mean"], row["ra"]["mean"], row["seconds"]["mean"]) for row in known}
        return points, "RA, %"
    drawn = [row for row in table.values() if row["ua"] and row["image_drift"]]
    points = {
        row["title"]: (row["ua"]["mean"], 100 * (1 - row["image_drift"]["mean"]), row["seconds"]["mean"])
        for row in drawn
    }
    return points, "1 − image drift, %"
