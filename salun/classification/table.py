"""The table of a comparison with Retrain, paired by seed, as numbers and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from salun.classification.attacks.mia import FEATURES
from salun.classification.metrics import COMPARED, gap_to_retrain
from salun.classification.search import is_no_better_than_original
from salun.evaluation.interval import interval

Results = Mapping[int, Mapping[str, Any]]  # seed → a job's result


def table_of(
    results: Mapping[str, Results],
    retrain: Results,
    searched: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
    again: Results | None = None,
) -> dict[str, Any]:
    """The metrics of a comparison, for `run.json`.

    retrain: UA, RA, TA, MIA, RTE, each {mean, std, n, values}. original, again (Retrain of another seed, or None) and
    each of methods: the same, and
        gap: of each of the four means to Retrain's mean over the same seeds (in parentheses in the paper).
        gap_paper: the mean of those ("avg. gap" in the paper). Errors of different seeds cancel in it.
        gap_mean: over seeds, the mean of a seed's four gaps, in which nothing cancels; methods are compared by it. That
            of `again` is chance, since both models are exact.
        ToW, search; idle: see `is_no_better_than_original`.
        failed, why: the seeds without a result, and the reason of the first.
    differences: gap_mean of each variant minus that of the first, paired by seed, see `interval`.
    """
    exact = _good(retrain)
    table: dict[str, Any] = {
        "original": _row({seed: result["original"] for seed, result in exact.items()}, exact),
        "retrain": _metrics(list(exact.values())),
        "again": _row(_good(again), exact) if again else None,
        "methods": {},
    }
    gaps: dict[str, dict[int, float]] = {}
    for name, by_seed in results.items():
        good = _good(by_seed)
        gaps[name] = {s: float(gap_to_retrain(r, exact[s])["gap_mean"]) for s, r in good.items() if s in exact}
        failed = sorted(seed for seed in by_seed if seed not in good)
        table["methods"][name] = {
            "title": titles[name],
            **_row(good, exact),
            "search": searched.get(name),
            "idle": is_no_better_than_original(searched.get(name)),
            "failed": failed,
            "why": by_seed[failed[0]]["error"] if failed else None,
        }
    first = next(iter(results))
    pairs = {
        name: [by_seed[s] - gaps[first][s] for s in by_seed if s in gaps[first]]
        for name, by_seed in gaps.items()
        if name != first
    }
    table["differences"] = {"to": first, "of": {name: interval(values) for name, values in pairs.items()}}
    return table


def _good(results: Results) -> dict[int, Mapping[str, Any]]:
    return {seed: result for seed, result in results.items() if "error" not in result}


def _row(results: Results, exact: Results) -> dict[str, Any]:
    """Metrics of all seeds, and gaps of those that have a Retrain to these Retrains."""
    paired = [seed for seed in results if seed in exact]
    row = _metrics(list(results.values()))
    unlearned, retrained = (_metrics([side[seed] for seed in paired]) for side in (results, exact))
    row["gap"] = {name: abs(unlearned[name]["mean"] - retrained[name]["mean"]) if paired else None for name in COMPARED}
    row["gap_paper"] = sum(row["gap"].values()) / len(COMPARED) if paired else None
    gaps = [gap_to_retrain(results[seed], exact[seed]) for seed in paired]
    row["gap_mean"] = spread([float(gap["gap_mean"]) for gap in gaps])
    row["ToW"] = spread([float(gap["ToW"]) for gap in gaps])
    return row


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median and standard deviation (n − 1); None where there are too few values."""
    return {
        "mean": mean(values) if values else None,
        "median": median(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": list(values),
    }


def _metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = {name: spread([float(result[name]["value"]) for result in results]) for name in COMPARED}
    metrics["mia_features"] = {
        name: spread([float(result["mia_features"][name]["value"]) for result in results]) for name in FEATURES
    }
    seconds = [result["RTE"]["value"] for result in results]
    metrics["RTE"] = spread([float(value) for value in seconds if value is not None])
    curves = [result["relearning"]["steps"] for result in results if "relearning" in result]
    if curves:
        metrics["relearning"] = {**spread([float(steps) for steps in curves if steps is not None]), "of": len(curves)}
    return metrics


def tables_of(table: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """title → rows of text, the heading first: metrics, differences, attacks, searches."""
    return {
        "Metrics": lines_of(table),
        "Differences, paired by seed": difference_lines(table),
        "The attack, feature by feature": _attack_lines(table),
        "Relearning, steps": _relearning_lines(table),
        "The search": search_lines(table),
    }


def lines_of(table: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells as text, its heading first, as in the paper: mean ± std (gap to Retrain).

    Seconds are medians: a single run on a suspended machine would dominate the mean.
    """
    heading = ["method", *(f"{name} %" for name in COMPARED), "avg. gap", "gap by seed", "median gap", "ToW"]
    rows = [[*heading, "RTE s, median", "search s"]]
    retrain = table["retrain"]
    for title, row in _sides(table).items():
        if row is retrain:
            cells = [_cell(row[name]) for name in COMPARED]
            rows.append([title, *cells, "", "", "", "", _number(row["RTE"]["median"]), ""])
            continue
        cells = [f"{_cell(row[name])} ({_number(row['gap'][name])})" for name in COMPARED]
        gaps = [_number(row["gap_paper"]), _cell(row["gap_mean"]), _number(row["gap_mean"]["median"])]
        seconds = _number((row["search"] or {}).get("seconds")) if "search" in row else ""
        rows.append([title, *cells, *gaps, _cell(row["ToW"], 3), _number(row["RTE"]["median"]), seconds])
    return rows


def difference_lines(table: Mapping[str, Any]) -> list[list[str]]:
    """The paired differences as text, the heading first."""
    first = table["methods"][table["differences"]["to"]]["title"]
    rows = [["method", f"gap by seed minus that of {first}", "95 % by t", "95 % by bootstrap", "median", "seeds"]]
    for name, difference in table["differences"]["of"].items():
        mean_of, median_of = (_signed(difference[key]) for key in ("mean", "median"))
        ends = [_between((difference["low"], difference["high"])), _between(difference["bootstrap"])]
        rows.append([table["methods"][name]["title"], mean_of, *ends, median_of, str(difference["n"])])
    return rows


def search_lines(table: Mapping[str, Any]) -> list[list[str]]:
    """The result of each method's search as text, the heading first."""
    heading = ["method", "option", "value", "distance, points", "original's distance", "remark"]
    rows = [[*heading, "runs", "seconds"]]
    for row in table["methods"].values():
        result = row["search"]
        if not result:
            continue
        score = next((trial["score"] for trial in result["tried"] if trial["value"] == result["chosen"]), None)
        value = "none" if result["chosen"] is None else f"{result['chosen']:.3g}"
        cells = [row["title"], result["option"] or "", value, _number(score), _number(result["untouched"])]
        rows.append([*cells, result["remark"] or "", str(result["runs"]), f"{result['seconds']:.1f}"])
    return rows


def _attack_lines(table: Mapping[str, Any]) -> list[list[str]]:
    rows = [["method", *(f"{name.replace('_', ' ')} %" for name in FEATURES)]]
    return rows + [[title, *(_cell(row["mia_features"][n]) for n in FEATURES)] for title, row in _sides(table).items()]


def _relearning_lines(table: Mapping[str, Any]) -> list[list[str]]:
    known = {title: row["relearning"] for title, row in _sides(table).items() if "relearning" in row}
    rows = [["model", "steps until 99 % of the forget set is known", "within the limit, of seeds"]]
    return rows + [[title, _cell(steps), f"{steps['n']} of {steps['of']}"] for title, steps in known.items()]


def _sides(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """title → row, in the order of the table."""
    rows = {"original": table["original"], "Retrain": table["retrain"]}
    if table["again"] is not None:
        rows["Retrain, another seed"] = table["again"]
    return {**rows, **{row["title"]: row for row in table["methods"].values()}}


def _cell(values: Mapping[str, Any], digits: int = 2) -> str:
    if values["mean"] is None:
        return "–"
    return f"{values['mean']:.{digits}f}" + (f" ± {values['std']:.{digits}f}" if values["std"] is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "not known" if value is None else f"{value:+.2f}"


def _between(ends: Sequence[float | None] | None) -> str:
    return "not known" if ends is None or None in ends else f"{ends[0]:+.2f} to {ends[1]:+.2f}"
