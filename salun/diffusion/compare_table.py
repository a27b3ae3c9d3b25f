"""The table of a comparison of methods: means over concepts and seeds, and differences in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from salun.diffusion.compare_options import Variant
from salun.evaluation.estimate import Estimate
from salun.evaluation.interval import interval
from salun.methods import METHODS

PERCENT = 1000.0  # of a percentage, which a detector's correction may take beyond 100
ASR = "ASR "  # before the name of an attack, in a result's values
TRAINED = ("sampling", "saliency", "training")  # stages of a run that make the model, not its evaluation


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        name: Key of a result's values.
        title: For people. digits: Decimals shown.
    """

    name: str
    title: str
    digits: int = 1


COLUMNS = (
    Column("score", "UA × RA, %"),
    Column("ua", "UA, %"),
    Column("ra", "RA, %"),
    Column("ra_drop", "RA drop, points"),
    Column("neighbors", "RA of the concept's attribute, %"),
    Column("anchor", "anchor shown, %"),
    Column("asr", "ASR of the best attack, %"),
    Column("image_drift", "image drift", 3),
    Column("seconds", "seconds", 0),
    Column("passes", "passes", 0),
    Column("changed", "weights changed, %"),
    Column("delta_mb", "delta, MB", 2),
)


@dataclass(frozen=True)
class Result:
    """What came of one erasure.

    Args:
        job: Its name.
        values: By `COLUMNS`' names, and ASRs by attack; None for what could not be measured.
        outcome: The verdict's.
        error: Why there is nothing.
        notes: What went wrong besides.
    """

    job: str
    variant: str
    concept: str
    seed: int
    values: Mapping[str, float | None] = field(default_factory=dict)
    outcome: str = ""
    error: str = ""
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        job: str,
        variant: str,
        concept: str,
        seed: int,
        record: Mapping[str, Any],
        attribute: str | None,
        attacks: Mapping[str, float],
        passes: int | None = None,
        parameters: int = 1,
    ) -> Result:
        """The result in a finished run's `run.json`.

        Args:
            attribute: That the concept is a value of, such as "shape".
            attacks: Attack → its ASR in percent.
            passes: That it took, with those of its samples and mask.
            parameters: Of the network.

        Raises:
            KeyError, TypeError, ValueError: The record, which may be untrusted input, lacks a part or has another in
                its place.
        """
        metrics = record["metrics"]
        ua, ra, before = (_value(metrics, name) for name in ("ua", "ra_after", "ra_before"))
        deltas = [_number("bytes", entry["bytes"]) for entry in record["outputs"] if entry["kind"] == "delta"]
        drop = before - ra if before is not None and ra is not None else None
        values = {
            "score": score_of(metrics),
            "ua": ua,
            "ra": ra,
            "ra_drop": drop,
            "neighbors": _neighbors(metrics, attribute),
            "anchor": _value(metrics, "anchor"),
            "asr": max(attacks.values()) if attacks else None,
            "image_drift": _value(metrics, "image_drift"),
            "seconds": sum(_number(stage, record["timings"].get(stage, 0.0)) for stage in TRAINED),
            "passes": passes,
            "changed": 100 * _number("changed", record["rounding"]["changed"], most=parameters) / parameters,
            "delta_mb": deltas[0] / 1e6 if deltas else None,
            **{f"{ASR}{name}": rate for name, rate in attacks.items()},
        }
        outcome = metrics["verdict"]["outcome"]
        if not isinstance(outcome, str):
            raise TypeError("verdict is not a text")
        return cls(job, variant, concept, seed, values, outcome)


def score_of(metrics: Mapping[str, Any]) -> float | None:
    """UA × RA, both as percentages; where RA is unknown, UA × (1 − image drift). None without either."""
    ua, ra, drift = (_value(metrics, name) for name in ("ua", "ra_after", "image_drift"))
    if ua is None or (ra is None and drift is None):
        return None
    return ua * (ra / 100 if ra is not None else 1 - min(drift or 0.0, 1.0))


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    measured = metrics.get(name)
    return None if measured is None else _number(name, measured["value"], -PERCENT, PERCENT)


def _neighbors(metrics: Mapping[str, Any], attribute: str | None) -> float | None:
    """RA of an attribute, such as of other shapes."""
    of_all = metrics.get("ra_by_attribute") or {}
    if not isinstance(of_all, dict):
        raise TypeError("ra_by_attribute is not an object")
    measured = of_all.get(attribute)
    return None if measured is None else _number("ra_by_attribute", measured["after"]["value"], -PERCENT, PERCENT)


def _number(name: str, value: Any, least: float = 0.0, most: float = 1e15) -> float:
    """A number of a record. Raises TypeError or ValueError for anything else, and for one that no run can have."""
    if type(value) not in (int, float):
        raise TypeError(f"{name} is {str(value)[:40]!r}, which is not a number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value:g}, but must be from {least:g} to {most:g}")
    return float(value)


def table_of(variants: Sequence[Variant], results: Sequence[Result]) -> dict[str, Any]:
    """variant → its row: of each column mean and standard deviation, runs, verdicts, and the difference in score.

    The difference is to the first variant, on the same concepts and seeds, with its 95 % interval by Student's t.
    """
    rows: dict[str, Any] = {}
    first = {(each.concept, each.seed): each for each in results if each.variant == variants[0].name}
    for variant in variants:
        mine = [each for each in results if each.variant == variant.name and not each.error]
        row: dict[str, Any] = {"title": title_of(variant), "runs": len(mine)}
        for column in COLUMNS:
            row[column.name] = _spread([each.values.get(column.name) for each in mine])
        named = dict.fromkeys(name for each in mine for name in each.values if name.startswith(ASR))
        row["attacks"] = {name.removeprefix(ASR): _spread([each.values.get(name) for each in mine]) for name in named}
        row["outcomes"] = {
            name: sum(each.outcome == name for each in mine) for name in sorted({e.outcome for e in mine})
        }
        pairs = [(each.values["score"], first[each.concept, each.seed].values.get("score")) for each in mine]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        known = bool(differences) and variant.name != variants[0].name
        row["difference"] = _mean(differences).as_json() if known else None
        rows[variant.name] = row
    return rows


def _mean(differences: Sequence[float]) -> Estimate:
    of = interval(differences)
    return Estimate(of["mean"], of["n"], of["low"], of["high"])


def _spread(values: Sequence[float | None]) -> dict[str, float | int] | None:
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    return {"mean": float(known.mean()), "std": float(known.std(ddof=1)) if len(known) > 1 else 0.0, "n": len(known)}


def title_of(variant: Variant) -> str:
    """A variant's name in the table."""
    others = ", ".join(f"{name} {value}" for name, value in variant.options.items() if name != "method")
    return METHODS["diffusion"][variant.method].title + (f" ({others})" if others else "")


def cells_of(table: Mapping[str, Any]) -> list[list[str]]:
    """The table as text, its heading first; the best score first."""
    head = ["method", *(title_in(table, column) for column in COLUMNS), f"difference in {_score(table)}", "verdicts"]
    return [head, *(_cells(row) for row in ranked(table))]


def title_in(table: Mapping[str, Any], column: Column) -> str:
    """A column's title in a table."""
    return f"{_score(table)}, %" if column.name == "score" else column.title


def _score(table: Mapping[str, Any]) -> str:
    """What `score_of` is in a table: of a model without a detector of other prompts, RA is unknown."""
    known = [bool(row["ra"]) for row in table.values() if row["score"]]
    if all(known):
        return "UA × RA"
    return "UA × RA or (1 − image drift)" if any(known) else "UA × (1 − image drift)"


def attack_cells(table: Mapping[str, Any]) -> list[list[str]]:
    """The ASR of each attack as text, its heading first; without rows where nothing was attacked."""
    names = list(dict.fromkeys(name for row in table.values() for name in row["attacks"]))
    rows = [[row["title"], *(_shown(row["attacks"].get(name), 1) for name in names)] for row in ranked(table)]
    return [["method", *names], *rows] if names else []


def ranked(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a table, the best score first."""
    return sorted(table.values(), key=lambda row: -(row["score"] or {"mean": -1.0})["mean"])


def best_attack(row: Mapping[str, Any], column: Column) -> str:
    """In the column of the best attack's ASR, the attack with the highest mean, in parentheses; else nothing."""
    rates = {name: of["mean"] for name, of in row["attacks"].items() if of}
    return f" ({max(rates, key=lambda name: rates[name])})" if column.name == "asr" and rates else ""


def _shown(spread: Mapping[str, float] | None, digits: int) -> str:
    deviation = f" ± {spread['std']:.{digits}f}" if spread and spread["n"] > 1 else ""
    return f"{spread['mean']:,.{digits}f}{deviation}" if spread else "–"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["title"]]
    cells += [_shown(row[column.name], column.digits) + best_attack(row, column) for column in COLUMNS]
    of = row["difference"]
    ends = f" ({of['low']:+.1f} to {of['high']:+.1f})" if of and of["low"] is not None else ""
    cells.append(f"{of['value']:+.1f}{ends}" if of else "–")
    return [*cells, ", ".join(f"{count} {name}" for name, count in row["outcomes"].items()) or "failed"]
