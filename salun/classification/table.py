"""The table of a comparison: mean ± standard deviation over seeds, gaps to Retrain, differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from salun.classification.metrics import COMPARED, beside_retrain

Results = Mapping[int, Mapping[str, Any]]  # seed → a job's result


def table_of(
    results: Mapping[str, Results],
    retrain: Results,
    searched: Mapping[str, Mapping[str, Any] | None],
    titles: Mapping[str, str],
) -> dict[str, Any]:
    """What `run.json` says of a comparison.

    original, retrain: UA, RA, TA, MIA, RTE, each {mean, std, n, values}. methods: the same of each variant, with `gap`
    to Retrain's mean in each of the four (the paper's number in parentheses); gap_paper: the mean of those (its "avg.
    gap"); gap_mean: the mean over the four of each seed's own gaps, over seeds; ToW; search; failed: seeds without a
    result. Gaps of means let errors of different seeds cancel; gap_mean does not, and is what is compared.
    differences: gap_mean of each variant minus the first one's, paired by seed: mean with its 95 % interval by
    Student's t (None of fewer than two pairs).
    """
    good = {name: {s: r for s, r in some.items() if "error" not in r} for name, some in results.items()}
    exact = {seed: result for seed, result in retrain.items() if "error" not in result}
    table: dict[str, Any] = {
        "original": _figures([result["original"] for result in exact.values()]),
        "retrain": _figures(list(exact.values())),
        "methods": {},
    }
    gaps: dict[str, dict[int, float]] = {}
    for name, some in good.items():
        row: dict[str, Any] = {"title": titles[name], **_figures(list(some.values()))}
        beside = {seed: beside_retrain(result, exact[seed]) for seed, result in some.items() if seed in exact}
        gaps[name] = {seed: float(found["gap_mean"]) for seed, found in beside.items()}
        row["gap"] = {k: _distance(row[k], table["retrain"][k]) for k in COMPARED}
        known = [value for value in row["gap"].values() if value is not None]
        row["gap_paper"] = sum(known) / len(known) if known else None
        row["gap_mean"] = spread(list(gaps[name].values()))
        row["ToW"] = spread([float(found["ToW"]) for found in beside.values()])
        row["search"] = searched.get(name)
        row["failed"] = sorted(seed for seed in results[name] if seed not in some)
        table["methods"][name] = row
    first = next(iter(results))
    pairs = {
        name: [mine[s] - gaps[first][s] for s in mine if s in gaps[first]]
        for name, mine in gaps.items()
        if name != first
    }
    table["differences"] = {"to": first, "of": {name: interval(values) for name, values in pairs.items()}}
    return table


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n − 1); None where there are too few values."""
    return {
        "mean": mean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": list(values),
    }


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean of differences and its 95 % interval by Student's t."""
    n = len(values)
    if n < 2:
        return {"mean": mean(values) if values else None, "low": None, "high": None, "n": n}
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half, "n": n}


def _figures(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {name: spread([float(result[name]["value"]) for result in results]) for name in COMPARED}
    seconds = [result["RTE"]["value"] for result in results]
    found["RTE"] = spread([float(value) for value in seconds if value is not None])
    curves = [result["relearning"]["steps"] for result in results if "relearning" in result]
    if curves:
        found["relearning"] = {**spread([float(steps) for steps in curves if steps is not None]), "of": len(curves)}
    return found


def _distance(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    known = ours["mean"] is not None and theirs["mean"] is not None
    return abs(ours["mean"] - theirs["mean"]) if known else None


def tables_of(table: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """title → rows of text, the heading first: the figures, the differences, what the search found."""
    found = {"In figures": lines_of(table), "Differences, paired by seed": difference_lines(table)}
    searched = {name: row["search"] for name, row in table["methods"].items() if row["search"]}
    rows = [["method", "option", "value", "off by, points", "runs", "seconds"]]
    for name, told in searched.items():
        least = min(trial["score"] for trial in told["tried"])
        title, value = table["methods"][name]["title"], f"{told['chosen']:.3g}"
        rows.append([title, told["option"], value, f"{least:.2f}", str(told["runs"]), f"{told['seconds']:.1f}"])
    return {**found, "The search": rows}


def lines_of(table: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells as text, its heading first, as in the paper: mean ± std (gap to Retrain)."""
    rows = [["method", *(f"{name} %" for name in COMPARED), "avg. gap", "gap by seed", "RTE s", "search s"]]
    for title, side in (("original", table["original"]), ("Retrain", table["retrain"])):
        rows.append([title, *(_cell(side[name]) for name in COMPARED), "", "", _cell(side["RTE"]), ""])
    for row in table["methods"].values():
        cells = [f"{_cell(row[name])} ({_number(row['gap'][name])})" for name in COMPARED]
        told = row["search"]["seconds"] if row["search"] else None
        rows.append(
            [row["title"], *cells, _number(row["gap_paper"]), _cell(row["gap_mean"]), _cell(row["RTE"]), _number(told)]
        )
    return rows


def difference_lines(table: Mapping[str, Any]) -> list[list[str]]:
    """The paired differences as text, the heading first."""
    first = table["methods"][table["differences"]["to"]]["title"]
    rows = [["method", f"gap by seed minus that of {first}", "95 % interval", "seeds"]]
    for name, found in table["differences"]["of"].items():
        low, high = found["low"], found["high"]
        between = "not known" if low is None else f"{low:+.2f} to {high:+.2f}"
        told = "not known" if found["mean"] is None else f"{found['mean']:+.2f}"
        rows.append([table["methods"][name]["title"], told, between, str(found["n"])])
    return rows


def _cell(side: Mapping[str, Any]) -> str:
    if side["mean"] is None:
        return "–"
    return f"{side['mean']:.2f}" + (f" ± {side['std']:.2f}" if side["std"] is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
