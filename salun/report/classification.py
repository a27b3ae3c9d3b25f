"""The pages about a classifier's training, its unlearning, and a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salun.evaluation.estimate import from_json
from salun.evaluation.retrain_verdict import COMPARED, verdict_on_classifier, verdict_on_comparison
from salun.report import charts
from salun.report.density import summed
from salun.report.metrics import banner_of
from salun.report.render import Report, Section, loss_series, page

MEANING = (
    "UA: error on the forget set. RA: accuracy on the retain set. TA: accuracy on test images. MIA: percentage of the "
    "forget set that an attack classifies as never trained on. Each is best where it equals that of Retrain, the model "
    "trained again without the forget set."
)
CHANCE = (
    "“Retrain, another seed” is exact unlearning too, so its gap is chance: a method with a smaller gap cannot be "
    "distinguished from exact unlearning."
)
MATRIX = "Rows are true classes, columns predicted ones; correct predictions lie on the diagonal."


def run_page(run: Mapping[str, Any], layers: Mapping[str, Sequence[int]], classes: Sequence[str]) -> Report:
    """The page of one unlearning. run: as in `run.json`. layers: parameter → (selected, total) of the mask."""
    options, metrics = run["options"], run["metrics"]
    original, exact = metrics["original"], metrics["retrain"] or {}
    sections = [Section("Metrics", MEANING, _metric_rows(metrics))]
    if "search" in run:
        sections.append(_search_section(run["search"]))
    matrices = [
        charts.heat(side["confusion"][part], classes, f"{what}, {when}")
        for part, what in (("forget", "forget set"), ("test", "test images"))
        for when, side in (("before", original), ("after", metrics))
    ]
    sections.append(Section("Before and after, class by class", MATRIX, charts=matrices))
    if layers:
        mask = run["mask"]
        frozen = options["batchnorm"] == "frozen"
        text = f"{mask['selected']:,} of {mask['total']:,} weights were trained ({mask['mode']}); " + (
            "every other weight and BatchNorm's statistics are bit-exactly unchanged."
            if frozen
            else "BatchNorm's statistics were updated."
        )
        sections.append(Section("The mask, layer by layer", text, charts=[charts.bars(layers)]))
    if series := loss_series(run["losses"]):
        sections.append(Section("Training", charts=[charts.curves(series, "epoch", "mean loss")]))
    if "relearning" in metrics:
        relearning = {"unlearned": metrics["relearning"], "Retrain": exact.get("relearning")}
        sections.append(_relearning_section(relearning))
    title = f"Forgetting {options['forget']} of {options['data']} by {options['method']}"
    warnings = [*run["notes"], *((run["mask"] or {}).get("warnings", []))]
    verdict = banner_of(verdict_on_classifier(metrics))
    return page(title, _subtitle(run), sections, _run_headline(metrics), warnings, run, banner=verdict)


def _subtitle(run: Mapping[str, Any]) -> str:
    return f"{run['options']['model']} · seed {run['seed']} · on {run['device']}"


def train_page(run: Mapping[str, Any], classes: Sequence[str]) -> Report:
    """The page of a training. run: as in `run.json`."""
    metrics, seconds = run["metrics"], run["metrics"]["RTE"]["value"]
    titles = {"train": "training images", "validation": "validation images", "test": "test images"}
    rows = [["", "accuracy"], *([what, _cell(metrics[part])] for part, what in titles.items() if metrics[part])]
    rows.append(["seconds", "–" if seconds is None else f"{seconds:.2f}"])
    series = loss_series(run["losses"])
    matrices = [charts.heat(counts, classes, titles[part]) for part, counts in metrics["confusion"].items()]
    sections = [
        Section("Metrics", "Validation and test images were not trained on.", rows),
        Section("Training", charts=[charts.curves(series, "epoch", "mean loss")]),
        Section("Class by class", MATRIX, charts=matrices),
    ]
    headline = [f"Accuracy on images that were not trained on: {metrics['test']['value']:.1f} %."]
    return page(f"Original model for {run['options']['data']}", _subtitle(run), sections, headline, run["notes"], run)


def comparison_page(
    run: Mapping[str, Any],
    tables: Mapping[str, Sequence[Sequence[str]]],
    rows: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    retrain: Mapping[int, Mapping[str, Any]],
    classes: Sequence[str],
) -> Report:
    """The page of a comparison.

    Args:
        tables: Title → cells as text.
        rows: Variant → method, mask and density, resolved.
        results: Variant → seed → the result of its job.
        retrain: Seed → the result of Retrain.
    """
    options, table = run["options"], run["metrics"]
    meaning = f"{MEANING} {CHANCE}" if table["again"] is not None else MEANING
    sections = [
        Section(title, "" if i else meaning, cells) for i, (title, cells) in enumerate(tables.items()) if len(cells) > 1
    ]
    density = _density_charts(table, rows)
    if density:
        text = "Means over seeds; the level line is Retrain."
        sections.append(Section("Against the density of the mask", text, charts=density))
    masked = {name: _layers(of) for name, of in results.items() if rows[name]["mask"] not in (None, "full")}
    if name := next((name for name, layers in masked.items() if layers), None):
        text = f"Of {table['methods'][name]['title']}, all seeds together."
        sections.append(Section("The mask, layer by layer", text, charts=[charts.bars(masked[name])]))
    sections += _confusions(table, results, retrain, classes)
    curves = _relearning_curves(table, results, retrain)
    if curves:
        text = "Fine-tuning on the forget set, at the first seed: accuracy on it after each step."
        sections.append(Section("Relearning", text, charts=[charts.curves(curves, "step", "accuracy, %")]))
    title = f"Forgetting {options['forget']} of {options['data']}: {len(rows)} methods, {options['seeds']} seeds"
    verdict = verdict_on_comparison(table)
    banner = banner_of(verdict) if verdict is not None else None
    return page(title, f"on {run['device']}", sections, _comparison_headline(table), run["notes"], run, banner=banner)


def _metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "original", "unlearned", "Retrain", "gap"]]
    exact, gap = metrics["retrain"], metrics["gap"]
    for name in COMPARED:
        sides = (metrics["original"], metrics, exact)
        rows.append([name, *(_cell(s[name]) if s else "–" for s in sides), f"{gap[name]:.2f}" if gap else "–"])
    for name in metrics["mia_features"]:
        sides = (metrics["original"], metrics, exact)
        cells = [_cell(s["mia_features"][name]) if s else "–" for s in sides]
        rows.append([f"MIA by {name.replace('_', ' ')}", *cells, ""])
    seconds = [metrics["RTE"]["value"], exact["RTE"]["value"] if exact else None]
    rows.append(["RTE, seconds", "", *("–" if s is None else f"{s:.2f}" for s in seconds), ""])
    if "search" in metrics["RTE"]:
        rows.append(["search, seconds", "", f"{metrics['RTE']['search']:.2f}", "", ""])
    return rows


def _run_headline(metrics: Mapping[str, Any]) -> list[str]:
    before, after = metrics["original"], metrics
    wrong = round(after["UA"]["n"] * after["UA"]["value"] / 100)
    lines = [f"The unlearned model misclassifies {wrong:,} of {after['UA']['n']:,} images of the forget set."]
    if metrics["gap"] is None:
        return [*lines, f"The gap to Retrain is unknown: {metrics['reason']}."]
    exact = metrics["retrain"]
    lines.append(
        f"Error on them: {exact['UA']['value']:.1f} % for Retrain, which was never trained on them, "
        f"{after['UA']['value']:.1f} % for the unlearned model, {before['UA']['value']:.1f} % for the original."
    )
    return [*lines, f"Mean gap to Retrain over UA, RA, TA and MIA: {metrics['gap_mean']:.2f} percentage points."]


def _comparison_headline(table: Mapping[str, Any]) -> list[str]:
    known = {n: r["gap_mean"]["mean"] for n, r in table["methods"].items() if r["gap_mean"]["mean"] is not None}
    if not known:
        return ["No method has a result at any seed."]
    idle = [name for name in known if table["methods"][name]["idle"]]
    ranked = {name: gap for name, gap in known.items() if name not in idle}
    lines = []
    if ranked:
        best = min(ranked, key=lambda name: ranked[name])
        row = table["methods"][best]
        lines.append(
            f"Nearest to Retrain over {row['gap_mean']['n']} seeds: {row['title']}, with a gap of {ranked[best]:.2f} "
            "percentage points in the mean over UA, RA, TA and MIA."
        )
    if idle:
        titles = ", ".join(table["methods"][name]["title"] for name in idle)
        lines.append(f"Not ranked, since the search found no effect: {titles}.")
    away = [side["gap_mean"]["mean"] if side is not None else None for side in (table["original"], table["again"])]
    if away[0] is not None:
        lines.append(f"The gap of the original, which forgot nothing, is {away[0]:.2f} percentage points.")
    if away[1] is not None:
        lines.append(f"The gap of Retrain with another seed is {away[1]:.2f} percentage points, which is chance.")
    failed = [row["title"] for row in table["methods"].values() if row["gap_mean"]["n"] == 0]
    return [*lines, f"Without a result: {', '.join(failed)}."] if failed else lines


def _search_section(search: Mapping[str, Any]) -> Section:
    empty = [""] * len(COMPARED)
    rows = [[search["option"], "score, points", *(f"{name} %" for name in COMPARED)]]
    rows.append(["expected", "", *(f"{search['foretold'][name]:.2f}" for name in COMPARED)])
    rows.append(["untouched model", f"{search['untouched']:.2f}", *empty])
    for trial in search["tried"]:
        mark = " ←" if trial["value"] == search["chosen"] else ""
        if trial["score"] is None:
            rows.append([f"{trial['value']:.3g}", trial["reason"], *empty])
        else:
            cells = [f"{trial['figures'][name]:.2f}" for name in COMPARED]  # codespell:ignore figures
            rows.append([f"{trial['value']:.3g}{mark}", f"{trial['score']:.2f}", *cells])
    text = (
        f"{len(search['tried'])} values in {search['seconds']:.1f} s, scored on validation images by the distance to "
        "the metrics of Retrain that the original predicts; Retrain itself is not used."
    )
    if search["remark"] is not None:
        text += f" Caution with the chosen value: {search['remark']}."
    return Section("The search", text, rows)


def _relearning_section(sides: Mapping[str, Mapping[str, Any] | None]) -> Section:
    known = {name: side for name, side in sides.items() if side is not None}
    rows = [["model", "steps until the forget set is relearned"]]
    rows += [[name, str(side["reason"] if side["steps"] is None else side["steps"])] for name, side in known.items()]
    curves = {name: _points(side["curve"]) for name, side in known.items()}
    text = "Fine-tuning on the forget set: suppressed knowledge is relearned faster than knowledge never learned."
    return Section("Relearning", text, rows, [charts.curves(curves, "step", "accuracy, %")])


def _points(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in curve]


def _relearning_curves(
    table: Mapping[str, Any],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    retrain: Mapping[int, Mapping[str, Any]],
) -> dict[str, list[tuple[float, float]]]:
    seed = min(retrain)
    sides = {"Retrain": retrain[seed]}
    sides |= {table["methods"][name]["title"]: of[seed] for name, of in results.items()}
    return {name: _points(side["relearning"]["curve"]) for name, side in sides.items() if "relearning" in side}


def _density_charts(table: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A chart of each metric, with a line for each method and mask of at least two densities; none without such."""
    lines: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["mask"] not in (None, "full") and table["methods"][name]["UA"]["mean"] is not None:
            lines.setdefault(f"{row['method']}, {row['mask']}", []).append(name)
    lines = {title: names for title, names in lines.items() if len({rows[n]["density"] for n in names}) > 1}
    drawn = []
    for metric in COMPARED if lines else ():
        series = {
            title: sorted((float(rows[n]["density"]), float(table["methods"][n][metric]["mean"])) for n in names)
            for title, names in lines.items()
        }
        ends = [x for line in series.values() for x, _ in line]
        level = table["retrain"][metric]["mean"]
        if level is not None:
            series["Retrain"] = [(min(ends), level), (max(ends), level)]
        drawn.append(charts.curves(series, f"density ({metric})", f"{metric}, %"))
    return drawn


def _layers(results: Mapping[int, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Parameter → (selected, total), summed over seeds."""
    counts = {
        (seed, name): (selected, total)
        for seed, result in results.items()
        for name, (selected, total) in result.get("layers", {}).items()
    }
    return summed(counts, lambda key: key[1])


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
    for part, what in (("forget", "forget set"), ("test", "test images")):
        for name, of in sides.items():
            total = [
                [sum(s["confusion"][part][i][j] for s in of) for j in range(len(classes))] for i in range(len(classes))
            ]
            drawn.append(charts.heat(total, classes, f"{what}, {name}"))
    return [Section("Before and after, class by class", f"{MATRIX} All seeds together.", charts=drawn)]


def _cell(value: Mapping[str, Any]) -> str:
    return from_json(value).text(digits=2)
