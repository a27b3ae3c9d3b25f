"""One self-contained HTML page about a run, for someone who has not read the paper."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun.files import write_bytes
from salun.report import charts

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Report:
    """The page. html: complete, no outside references."""

    html: str

    def save(self, path: Path | str) -> None:
        """Write it whole, or not at all."""
        write_bytes(Path(path), self.html.encode("utf-8", "backslashreplace"))


def render(
    run: Mapping[str, Any],
    forget_picture: bytes | None,
    retain_picture: bytes | None,
    layers: Mapping[str, tuple[int, int]],
    blurred: bool = False,
) -> str:
    """The page of a run. run: as in `run.json`. The pictures: PNG bytes. Everything shown is escaped.

    blurred: whether forget pictures are, so that the page says why.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = _size
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    metrics, concepts = run["metrics"], run["concepts"]
    return template.render(
        run=run,
        names=[concept["name"] for concept in concepts],
        metrics=metrics,
        known=metrics.get("ua") is not None,
        headline=headline(concepts, metrics),
        rows=figure_rows(concepts, metrics),
        concept_rows=concept_rows(concepts, metrics),
        classes=class_rows(metrics),
        forget_picture=_data_url(forget_picture),
        retain_picture=_data_url(retain_picture),
        loss_chart=Markup(charts.loss_curve(run["losses"])),  # names escaped where they are drawn
        layer_chart=Markup(charts.layer_bars(layers)),  # names escaped where they are drawn
        blurred=blurred,
        minutes=sum(run["timings"].values()),
    )


def layers_page(
    title: str,
    facts: Mapping[str, Any],
    blocks: Mapping[str, Mapping[str, Sequence[int]]],
    layers: Mapping[str, Sequence[int]],
) -> Report:
    """A page on a mask, delta or pair of masks.

    blocks: what a chart shows → block → (selected, total). layers: parameter → (selected, total), shown as a table.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.with_name("layers.html.j2").read_text(encoding="utf-8"))
    drawn = {name: Markup(charts.bars(of)) for name, of in blocks.items()}  # names escaped where they are drawn
    return Report(template.render(title=title, facts=facts, charts=drawn, layers=layers))


def headline(concepts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[str]:
    """What happened, in plain sentences, good or bad."""
    if metrics.get("ua") is None:
        names = " and ".join(f"“{concept['name']}”" for concept in concepts)
        return [f"The model was trained to forget {names}. Whether it did is not known: {metrics['reason']}."]
    lines = [line for concept in concepts for line in _verdict(concept, metrics["per_concept"][concept["name"]])]
    before, after = metrics["ra_before"]["value"], metrics["ra_after"]["value"]
    fall = before - after
    judged = "is as it was" if fall <= 1 else "suffered a little" if fall <= 3 else "suffered"
    return [*lines, f"Everything else {judged}: {before:.1f} % right before, {after:.1f} % now."]


def _verdict(concept: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    ua, n = figures["ua"]["value"], figures["ua"]["n"]
    shown = round(n * (100 - ua) / 100)
    was = round(n * (100 - figures["ua_before"]["value"]) / 100)
    many = f"{shown} of {n} pictures" if shown else f"none of {n} pictures"
    verdict = "forgot" if ua >= 95 else "mostly forgot" if ua >= 80 else "did not forget"
    lines = [f"The model {verdict} “{concept['name']}”: asked for it, it now shows it in {many} (before: {was})."]
    if figures["anchor"] is not None:
        lines.append(f"“{concept['anchor']}”, what it was to become, is seen in {figures['anchor']['value']:.0f} %.")
    if figures["none"]["value"] > 5:
        lines.append(f"Careful: {figures['none']['value']:.0f} % of them are no proper pictures any more.")
    return lines


def concept_rows(concepts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(concept, anchor, forgotten, anchor shown, the rest kept, no picture) rows of several concepts; none for one."""
    if metrics.get("ua") is None or len(concepts) < 2:
        return []
    rows: list[tuple[str, ...]] = []
    for concept in concepts:
        figures = metrics["per_concept"][concept["name"]]
        anchor = _share(figures["anchor"]) if figures["anchor"] is not None else "not known"
        kept = _share(figures["kept"]["all"]) if "all" in figures["kept"] else "not known"
        shown = concept["anchor"] or "the empty prompt"
        rows.append((concept["name"], shown, _share(figures["ua"]), anchor, kept, _share(figures["none"])))
    return rows


def figure_rows(concepts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, before, after, meaning) rows, over all concepts together."""
    if metrics.get("ua") is None:
        return []
    one = concepts[0] if len(concepts) == 1 else None
    gone = f"asked for “{one['name']}”, the picture shows none" if one else "asked for a concept, the picture lacks it"
    instead = f"it shows “{one['anchor']}” instead" if one else "it shows that concept's anchor instead"
    rows = [("forgotten (UA)", _share(metrics["ua_before"]), _share(metrics["ua"]), gone)]
    if metrics["anchor"] is not None:
        rows.append(("anchor shown", _share(metrics["anchor_before"]), _share(metrics["anchor"]), instead))
    for key, share in metrics["kept"].items():
        label = "all the rest kept" if key == "all" else f"{key} kept"
        rows.append(
            (label, _share(metrics["kept_before"][key]), _share(share), "the rest of the prompt is still followed")
        )
    rows.append(
        ("no picture", _share(metrics["none_before"]), _share(metrics["none"]), "destroyed rather than forgotten")
    )
    rows.append(
        (
            "retain accuracy (RA)",
            _share(metrics["ra_before"]),
            _share(metrics["ra_after"]),
            "other prompts, still right",
        )
    )
    for key, sides in metrics["ra_by_attribute"].items():
        rows.append((f"RA, {key}", _share(sides["before"]), _share(sides["after"]), ""))
    return rows


def class_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(class, before, after, change), the greatest losses first."""
    sides = metrics.get("per_class") or {}
    ordered = sorted(sides.items(), key=lambda item: item[1]["after"]["value"] - item[1]["before"]["value"])
    return [
        (name, _share(s["before"]), _share(s["after"]), f"{s['after']['value'] - s['before']['value']:+.1f}")
        for name, s in ordered
    ]


def _share(share: Mapping[str, Any]) -> str:
    return f"{share['value']:.1f} % ({share['low']:.1f}–{share['high']:.1f}, n = {share['n']})"


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _data_url(png: bytes | None) -> str | None:
    return None if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii")
