"""The pages of a classifier's unlearning and of a comparison: self-contained, everything shown is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salun.report import charts
from salun.report.page import Report

TEMPLATE = Path(__file__).with_name("classification.html.j2")
COMPARED = ("UA", "RA", "TA", "MIA")
MEANING = (
    "UA: error on the forget set. RA: accuracy on what was kept for training. TA: accuracy on test pictures. MIA: "
    "share of the forget set that an attack takes for pictures never trained on. Each is best where Retrain has it, "
    "the model trained again without the forget set."
)


CHANCE = (
    "“Retrain, another seed” is as exact as Retrain, so its gap is chance: no method can be told from exact within it."
)


@dataclass(frozen=True)
class Section:
    """A part of the page. rows: of a table, its heading first. charts: SVG, in which names are escaped."""

    title: str
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[str] = field(default_factory=list)


def run_page(run: Mapping[str, Any], layers: Mapping[str, Sequence[int]], classes: Sequence[str]) -> Report:
    """The page of one unlearning. run: as in `run.json`. layers: parameter → (selected, total) of the mask."""
    options, metrics = run["options"], run["metrics"]
    original, exact = metrics["original"], metrics["retrain"]
    sections = [Section("In figures", MEANING, _figure_rows(metrics))]
    if "search" in run:
        sections.append(_search_section(run["search"]))
    sections.append(
        Section(
            "Before and after, class by class",
            "Rows are true classes, columns the model's answers; right ones lie on the diagonal.",
            charts=[
                charts.heat(side["confusion"][part], classes, f"{what}, {when}")
                for part, what in (("forget", "forget set"), ("test", "test pictures"))
                for when, side in (("before", original), ("after", metrics))
            ],
        )
    )
    if layers:
        told = run["mask"]
        text = (
            f"{told['selected']:,} of {told['total']:,} weights could move ({told['mode']}); every other one is the "
            f"same to the last bit, and so are BatchNorm's statistics."
            if options["batchnorm"] == "frozen"
            else f"{told['selected']:,} of {told['total']:,} weights could move ({told['mode']}); BatchNorm's "
            "statistics were updated."
        )
        sections.append(Section("The mask, layer by layer", text, charts=[charts.bars(layers)]))
    curves = charts.loss_series(run["losses"], "epoch")
    if curves:
        sections.append(Section("Training", charts=[charts.curves(curves, "epoch", "mean loss")]))
    relearnt = {"unlearned": metrics.get("relearning"), "Retrain": (exact or {}).get("relearning")}
    if relearnt["unlearned"] is not None:
        sections.append(_relearning_section(relearnt))
    headline = _run_headline(metrics)
    title = f"Forgetting {options['forget']} of {options['data']} by {options['method']}"
    subtitle = f"{options['model']} · seed {run['seed']} · on {run['device']}"
    warnings = [*run["notes"], *((run["mask"] or {}).get("warnings", []))]
    return _page(title, subtitle, headline, warnings, sections, run)


def train_page(run: Mapping[str, Any], classes: Sequence[str]) -> Report:
    """The page of a training. run: as in `run.json`."""
    options, metrics = run["options"], run["metrics"]
    titles = {"train": "training pictures", "validation": "validation pictures", "test": "test pictures"}
    rows = [["", "accuracy"], *([what, _share(metrics[part])] for part, what in titles.items() if metrics[part])]
    rows.append(["seconds", "–" if metrics["RTE"]["value"] is None else f"{metrics['RTE']['value']:.2f}"])
    curve = charts.loss_series(run["losses"], "epoch")
    drawn = [charts.heat(counts, classes, titles[part]) for part, counts in metrics["confusion"].items()]
    sections = [
        Section("In figures", "Validation and test pictures were not trained on.", rows),
        Section("Training", charts=[charts.curves(curve, "epoch", "mean loss")]),
        Section("Class by class", "Rows are true classes, columns the model's answers.", charts=drawn),
    ]
    headline = [f"Of pictures that it never saw, the model knows {metrics['test']['value']:.1f} %."]
    subtitle = f"{options['model']} · seed {run['seed']} · on {run['device']}"
    return _page(f"An original for {options['data']}", subtitle, headline, run["notes"], sections, run)


def comparison_page(
    run: Mapping[str, Any],
    tables: Mapping[str, Sequence[Sequence[str]]],
    rows: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    retrain: Mapping[int, Mapping[str, Any]],
    classes: Sequence[str],
) -> Report:
    """The page of a comparison.

    tables: title → cells as text. rows: variant → method, mask and density, resolved. results: variant → seed → what
    its job found. retrain: the same of Retrain.
    """
    options, table = run["options"], run["metrics"]
    told = f"{MEANING} {CHANCE}" if table["again"] is not None else MEANING
    sections = [
        Section(title, told if not i else "", cells)
        for i, (title, cells) in enumerate(tables.items())
        if len(cells) > 1
    ]
    density = _density_charts(table, rows)
    if density:
        text = "Means over seeds; the level line is Retrain."
        sections.append(Section("Against the density of the mask", text, charts=density))
    masked = {name: _mean_layers(some) for name, some in results.items() if rows[name]["mask"] not in (None, "full")}
    masked = {name: layers for name, layers in masked.items() if layers}
    if masked:
        name = next(iter(masked))
        text = f"Of {table['methods'][name]['title']}, all seeds together."
        sections.append(Section("The mask, layer by layer", text, charts=[charts.bars(masked[name])]))
    sections += _confusions(table, results, retrain, classes)
    curves = _relearning_curves(table, results, retrain)
    if curves:
        text = "Fine-tuning on the forget set, at the first seed: how much of it is known after each step."
        sections.append(Section("Relearning", text, charts=[charts.curves(curves, "step", "known, %")]))
    title = f"Forgetting {options['forget']} of {options['data']}: {len(rows)} methods, {options['seeds']} seeds"
    return _page(title, f"on {run['device']}", _comparison_headline(table), run["notes"], sections, run)


def _page(
    title: str,
    subtitle: str,
    headline: Sequence[str],
    notes: Sequence[str],
    sections: Sequence[Section],
    run: Mapping[str, Any],
) -> Report:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [  # names are escaped where the charts are drawn
        {"title": s.title, "text": s.text, "rows": s.rows, "charts": [Markup(c) for c in s.charts if c]}
        for s in sections
    ]
    return Report(
        template.render(title=title, subtitle=subtitle, headline=headline, notes=notes, sections=shown, run=run)
    )


def _figure_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "original", "unlearned", "Retrain", "gap"]]
    exact, gap = metrics["retrain"], metrics["gap"]
    for name in COMPARED:
        sides = (metrics["original"], metrics, exact)
        rows.append([name, *(_share(s[name]) if s else "–" for s in sides), f"{gap[name]:.2f}" if gap else "–"])
    for name in metrics["mia_features"]:
        sides = (metrics["original"], metrics, exact)
        cells = [_share(s["mia_features"][name]) if s else "–" for s in sides]
        rows.append([f"MIA by {name.replace('_', ' ')}", *cells, ""])
    seconds = [metrics["RTE"]["value"], exact["RTE"]["value"] if exact else None]
    rows.append(["RTE, seconds", "", *("–" if s is None else f"{s:.2f}" for s in seconds), ""])
    if "search" in metrics["RTE"]:
        rows.append(["search, seconds", "", f"{metrics['RTE']['search']:.2f}", "", ""])
    return rows


def _run_headline(metrics: Mapping[str, Any]) -> list[str]:
    before, after = metrics["original"], metrics
    wrong = round(after["UA"]["n"] * after["UA"]["value"] / 100)
    lines = [f"Of {after['UA']['n']:,} pictures to forget, the model is now wrong about {wrong:,}."]
    if metrics["gap"] is None:
        return [*lines, f"How near that is to retraining is not known: {metrics['reason']}."]
    exact = metrics["retrain"]
    lines.append(
        f"A model that never saw them is wrong about {exact['UA']['value']:.1f} % of them; this one about "
        f"{after['UA']['value']:.1f} %, the original about {before['UA']['value']:.1f} %."
    )
    return [*lines, f"Mean gap to Retrain over UA, RA, TA and MIA: {metrics['gap_mean']:.2f} points."]


def _comparison_headline(table: Mapping[str, Any]) -> list[str]:
    known = {n: r["gap_mean"]["mean"] for n, r in table["methods"].items() if r["gap_mean"]["mean"] is not None}
    if not known:
        return ["No method gave a model at any seed."]
    idle = [name for name in known if table["methods"][name]["idle"]]
    ranked = {name: gap for name, gap in known.items() if name not in idle}
    lines = []
    if ranked:
        best = min(ranked, key=lambda name: ranked[name])
        row = table["methods"][best]
        lines.append(
            f"Nearest to Retrain over {row['gap_mean']['n']} seeds: {row['title']}, {ranked[best]:.2f} points away in "
            "the mean over UA, RA, TA and MIA."
        )
    if idle:
        titles = ", ".join(table["methods"][name]["title"] for name in idle)
        lines.append(f"Did nothing, by the search, and so has no place: {titles}.")
    away = [side["gap_mean"]["mean"] if side is not None else None for side in (table["original"], table["again"])]
    if away[0] is not None:
        lines.append(f"The original, which forgot nothing, is {away[0]:.2f} points away.")
    if away[1] is not None:
        lines.append(f"A Retrain of another seed is {away[1]:.2f} points away: that much is chance.")
    failed = [row["title"] for row in table["methods"].values() if row["gap_mean"]["n"] == 0]
    return [*lines, f"Without a result: {', '.join(failed)}."] if failed else lines


def _search_section(told: Mapping[str, Any]) -> Section:
    names = ("UA", "RA", "TA", "MIA")
    rows = [[told["option"], "off by, points", *(f"{name} %" for name in names)]]
    rows.append(["foretold", "", *(f"{told['foretold'][name]:.2f}" for name in names)])
    rows.append(["untouched model", f"{told['untouched']:.2f}", *("" for _ in names)])
    for trial in told["tried"]:
        mark = " ←" if trial["value"] == told["chosen"] else ""
        if trial["score"] is None:
            rows.append([f"{trial['value']:.3g}", trial["reason"], *("" for _ in names)])
        else:
            cells = [f"{trial['figures'][name]:.2f}" for name in names]
            rows.append([f"{trial['value']:.3g}{mark}", f"{trial['score']:.2f}", *cells])
    text = (
        f"{len(told['tried'])} values in {told['seconds']:.1f} s, judged on validation pictures against what the "
        "original lets expect of Retrain, without looking at Retrain."
    )
    if told["remark"] is not None:
        text += f" To be held against the value taken: {told['remark']}."
    return Section("The search", text, rows)


def _relearning_section(found: Mapping[str, Mapping[str, Any] | None]) -> Section:
    rows = [["model", "steps until the forget set is known again"]]
    for name, told in found.items():
        if told is not None:
            rows.append([name, str(told["steps"]) if told["steps"] is not None else str(told["reason"])])
    lines = {name: [(float(x), float(y)) for x, y in told["curve"]] for name, told in found.items() if told}
    text = "Fine-tuning on the forget set with its own labels: what was only hidden comes back sooner."
    return Section("Relearning", text, rows, [charts.curves(lines, "step", "known, %")])


def _relearning_curves(
    table: Mapping[str, Any],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    retrain: Mapping[int, Mapping[str, Any]],
) -> dict[str, list[tuple[float, float]]]:
    seed = min(retrain)
    sides = {"Retrain": retrain[seed]}
    sides |= {table["methods"][name]["title"]: some[seed] for name, some in results.items()}
    return {
        name: [(float(x), float(y)) for x, y in side["relearning"]["curve"]]
        for name, side in sides.items()
        if "relearning" in side
    }


def _density_charts(table: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A chart of each figure, a line for each method and mask that has two densities at least; none if none has."""
    lines: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["mask"] not in (None, "full") and table["methods"][name]["UA"]["mean"] is not None:
            lines.setdefault(f"{row['method']}, {row['mask']}", []).append(name)
    lines = {title: names for title, names in lines.items() if len({rows[n]["density"] for n in names}) > 1}
    drawn = []
    for figure in COMPARED if lines else ():
        series = {
            title: sorted((float(rows[n]["density"]), float(table["methods"][n][figure]["mean"])) for n in names)
            for title, names in lines.items()
        }
        ends = [x for line in series.values() for x, _ in line]
        level = table["retrain"][figure]["mean"]
        if level is not None:
            series["Retrain"] = [(min(ends), level), (max(ends), level)]
        drawn.append(charts.curves(series, f"density ({figure})", f"{figure}, %"))
    return drawn


def _mean_layers(some: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """parameter → [selected, total], summed over seeds."""
    found: dict[str, list[int]] = {}
    for result in some.values():
        for name, (selected, total) in result.get("layers", {}).items():
            before = found.get(name, [0, 0])
            found[name] = [before[0] + selected, before[1] + total]
    return found


def _confusions(
    table: Mapping[str, Any],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    retrain: Mapping[int, Mapping[str, Any]],
    classes: Sequence[str],
) -> list[Section]:
    """Before, after (the first variant) and Retrain, all seeds added up."""
    first = next(iter(results))
    good = [seed for seed, result in results[first].items() if "confusion" in result and "confusion" in retrain[seed]]
    if not good:
        return []
    sides = {
        "before": [retrain[seed]["original"] for seed in good],
        f"after {table['methods'][first]['title']}": [results[first][seed] for seed in good],
        "Retrain": [retrain[seed] for seed in good],
    }
    drawn = []
    for part, what in (("forget", "forget set"), ("test", "test pictures")):
        for name, some in sides.items():
            total = [
                [sum(s["confusion"][part][i][j] for s in some) for j in range(len(classes))]
                for i in range(len(classes))
            ]
            drawn.append(charts.heat(total, classes, f"{what}, {name}"))
    text = "Rows are true classes, columns the model's answers; right ones lie on the diagonal. All seeds together."
    return [Section("Before and after, class by class", text, charts=drawn)]


def _share(side: Mapping[str, Any]) -> str:
    return f"{side['value']:.2f} % ({side['low']:.1f}–{side['high']:.1f}, n = {side['n']:,})"
