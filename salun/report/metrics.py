"""The metrics of an erasure for people: sentences, tables and lines, made from `run.json` for every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from salun.errors import fill
from salun.evaluation.estimate import Estimate, Unknown, Value, from_json
from salun.evaluation.metric import Metric
from salun.evaluation.registry import METRICS
from salun.evaluation.verdict import Verdict, verdict_on
from salun.report.render import Banner, Section

SINGLE = [metric for metric in METRICS if not metric.breakdown]
OF_CONCEPTS = [metric for metric in SINGLE if metric.per_concept]
ARROWS = {"higher": "↑", "lower": "↓"}


def values(metric: Metric, metrics: Mapping[str, Any]) -> tuple[Value, Value]:
    """A metric before and after. metrics: as in `run.json`, of all concepts or of one."""
    reason = (metrics.get("reasons") or {}).get(metric.key, metrics.get("reason") or "not measured")
    return from_json(metrics.get(metric.key_before), reason), from_json(metrics.get(metric.key), reason)


def headline(concepts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[str]:
    """What happened besides the verdict, in plain sentences. concepts: as in `run.json`."""
    measured = metrics.get("per_concept") or {}
    listed = [(metric, measured.get(concept["name"], {}), concept) for concept in concepts for metric in OF_CONCEPTS]
    listed += [(metric, metrics, {}) for metric in SINGLE if not metric.per_concept]
    lines = []
    for metric, side, concept in listed:
        before, after = values(metric, side)
        if metric.finding is not None and isinstance(before, Estimate) and isinstance(after, Estimate):
            lines.append(metric.finding(before, after, concept))
    return [line for line in lines if line]


def banner(metrics: Mapping[str, Any], spell: Callable[[str], str] = str) -> Banner:
    """The verdict, as the first thing on a page. spell: option name → how the host spells it."""
    return banner_of(verdict_on(metrics), spell)  # not the stored one: a run.json may be untrusted input


def banner_of(verdict: Verdict, spell: Callable[[str], str] = str) -> Banner:
    """A verdict as the first thing on a page, likewise."""
    outcome = str(verdict.outcome)
    return Banner(outcome[0].upper() + outcome[1:], f"{verdict.text}.", f"Next: {fill(verdict.advice, spell)}.")


def verdict_lines(metrics: Mapping[str, Any], spell: Callable[[str], str] = str) -> list[str]:
    """The verdict in a line, and the next step in another."""
    return lines_of(banner(metrics, spell))


def lines_of(shown: Banner) -> list[str]:
    """What a banner says, in two lines."""
    return [f"{shown.outcome}: {shown.text}", shown.next]


def calibration_sections(metrics: Mapping[str, Any]) -> list[Section]:
    """How the detector does on the original's own images, for each concept; none where nothing was detected."""
    rows = [("concept", "detected in images of its prompts", "false alarms in others", "AUC", "")]
    for name, of in (metrics.get("per_concept") or {}).items():
        if calibration := of.get("calibration"):
            sides = [from_json(calibration[key]).text() for key in ("detected", "false_alarms")]
            auc = calibration["auc"]
            rows.append((name, *sides, "" if auc is None else f"{100 * auc:.1f} %", calibration["reason"] or ""))
    text = (
        "A detector's word is worth what it is on the original model, before the erasure. The corrected UA takes its "
        "misses and false alarms into account."
    )
    return [Section("Calibration of the detector", text, rows, wrap=True)] if len(rows) > 1 else []


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, meaning) of every metric that is known, over all concepts."""
    rows = []
    for metric in SINGLE:
        before, after = values(metric, metrics)
        if isinstance(after, Estimate):
            title = f"{metric.title} {ARROWS[metric.better]}"
            rows.append((title, _text(metric, before), _text(metric, after), metric.meaning))
    return rows


def unknown_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each reason why metrics are unknown."""
    reasons: dict[str, list[str]] = {}
    for metric in SINGLE:
        _, after = values(metric, metrics)
        if isinstance(after, Unknown):
            reasons.setdefault(after.reason, []).append(metric.title)
    return [f"Unknown: {', '.join(titles)} ({reason})" for reason, titles in reasons.items()]


def metric_sections(concepts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Section]:
    """The metrics as parts of a page: a table, one by concept where there are several, and breakdowns."""
    footer = "In parentheses the 95 % interval and the number of samples. ↑: higher is better, ↓: lower is better."
    if detector := metrics.get("detector"):
        footer += (
            f" Detector: {detector['name']} {detector['version']} (sha256 {detector['sha256'][:16]}…); a label counts "
            f"as detected from a score of {detector['threshold']:g} on ({detector['unit']})."
        )
    rows = [("", "before", "after", "meaning"), *metric_rows(metrics)]
    unknown = " ".join(f"{line}." for line in unknown_lines(metrics))
    sections = [Section("Metrics", unknown, rows if len(rows) > 1 else (), footer=footer, wrap=True)]
    measured = metrics.get("per_concept") or {}
    if len(measured) > 1:
        anchors = {concept["name"]: concept["anchor"] or "the empty prompt" for concept in concepts}
        table = [["concept", "anchor", *(metric.title for metric in OF_CONCEPTS)]]
        for name, side in measured.items():
            cells = [_text(metric, values(metric, side)[1]) for metric in OF_CONCEPTS]
            table.append([name, anchors.get(name, ""), *cells])
        sections.append(Section("", "After the erasure, by concept:", table))
    return sections + [
        Section("", metric.meaning, [("", "before", "after", "change"), *changes], folded=metric.title)
        for metric in METRICS
        if metric.breakdown and (changes := _changes(metric, metrics))
    ]


def _changes(metric: Metric, metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(part, before, after, change) of a breakdown, the greatest losses first."""
    rows = []
    for part, sides in (metrics.get(metric.key) or {}).items():
        before, after = from_json(sides["before"]), from_json(sides["after"])
        change = after.value - before.value if isinstance(after, Estimate) and isinstance(before, Estimate) else 0.0
        rows.append((change, (part, _text(metric, before), _text(metric, after), f"{change:+.1f}")))
    rows.sort(key=lambda row: row[0] if metric.better == "higher" else -row[0])
    return [cells for _, cells in rows]


def metric_lines(metrics: Mapping[str, Any], spell: Callable[[str], str] = str) -> list[str]:
    """The verdict and the metrics as lines of text."""
    return [*verdict_lines(metrics, spell), *measured_lines(metrics)]


def measured_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics as lines of text, those of each concept below where there are several."""
    lines = _lines(SINGLE, metrics)
    measured = metrics.get("per_concept") or {}
    for name, side in measured.items() if len(measured) > 1 else ():
        lines += [f"{name}:", *(f"  {line}" for line in _lines(OF_CONCEPTS, side))]
    return lines + unknown_lines(metrics)


def _lines(listed: Sequence[Metric], metrics: Mapping[str, Any]) -> list[str]:
    width = max(len(metric.title) for metric in listed) + 1
    known = [(metric, *values(metric, metrics)) for metric in listed]
    return [
        f"{metric.title + ':':<{width}} {_text(metric, after)}, before {before.value:.{_digits(metric)}f}"
        for metric, before, after in known
        if isinstance(after, Estimate) and isinstance(before, Estimate)
    ]


def _text(metric: Metric, value: Value) -> str:
    return value.text(metric.unit, _digits(metric))


def _digits(metric: Metric) -> int:
    return 1 if metric.unit == "%" else 3
