"""The page of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun.report import charts
from salun.report.render import Report, Section, page

if TYPE_CHECKING:
    from salun.diffusion.compare_table import Result

MEANING = (
    "Means ± standard deviations over concepts and seeds. UA: images of the concept's prompts without the concept. RA: "
    "images of other prompts that are as prompted. The difference in UA × RA is to the first method, on the same "
    "concepts and seeds, with its 95 % interval. Seconds: sampling, mask and training on this machine, where samples "
    "that several methods share count for the first of them."
)
TRADE_OFF = "Each point is a method, its size the time that it took; the best corner is at the top right."


def comparison_page(run: Mapping[str, Any], results: Sequence[Result], jobs: Path) -> Report:
    """The page.

    Args:
        run: As in `run.json`.
        jobs: The folder of the erasures' folders, whose images are shown.
    """
    from salun.diffusion.compare_table import cells_of

    table, options = run["metrics"], run["options"]
    points = {
        row["title"]: (row["ua"]["mean"], row["ra"]["mean"], row["seconds"]["mean"])
        for row in table.values()
        if row["ua"] and row["ra"]
    }
    sections = [Section("Methods", MEANING, cells_of(table))]
    if points:
        sections.append(Section("Trade-off", TRADE_OFF, charts=[charts.scatter(points, "UA, %", "RA, %")]))
    for concept in options["concept"]:
        shown = [each for each in results if each.concept == concept and each.seed == run["seed"] and not each.error]
        images = {
            f"{table[each.variant]['title']}: {each.outcome}": (jobs / each.job / "before_after.png").read_bytes()
            for each in shown
            if (jobs / each.job / "before_after.png").is_file()
        }
        if images:
            text = "At the first seed: above the original's images, below those of the erased model."
            sections.append(Section(f"“{concept}”", text, images=images))
    title = f"{len(table)} methods, {len(options['concept'])} concepts, {options['seeds']} seeds"
    return page(title, f"{options['model'] or 'shapes'} · on {run['device']}", sections, notes=run["notes"], run=run)
