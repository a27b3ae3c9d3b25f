"""Checks of a job's stored result, which may be untrusted input, since it lies in a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from salun.classification.attacks.mia import FEATURES
from salun.classification.metrics import COMPARED

LARGEST = 1e15  # of a number: its sums and squares stay finite


def check_result(kind: str, result: Any, classes: int, option: str | None, values: Sequence[float]) -> None:
    """Raises ValueError for a result that no table or report can be made from.

    kind: of the job. classes: of the data set, a count. option, values: what a search had to try.
    """
    result = _object("the result", result)
    if "error" in result:
        if not isinstance(result["error"], str):
            raise ValueError("error must be a text")
    elif kind == "search":
        _check_search(result, option, values)
    else:
        _check_metrics(result, classes)
        if kind == "retrain":
            _check_metrics(_object("original", result.get("original")), classes)


def _check_metrics(result: Mapping[str, Any], classes: int) -> None:
    for name in COMPARED:
        _number(f"{name}.value", _object(name, result.get(name)).get("value"))
    features = _object("mia_features", result.get("mia_features"))
    for name in FEATURES:
        _number(f"mia_features.{name}.value", _object(f"mia_features.{name}", features.get(name)).get("value"))
    _number_or_null("RTE.value", _object("RTE", result.get("RTE")).get("value", ""))
    confusion = _object("confusion", result.get("confusion"))
    for part in ("forget", "test"):
        rows = _list(f"confusion.{part}", confusion.get(part), classes)
        for row in rows:
            for count in _list(f"a row of confusion.{part}", row, classes):
                _count(f"confusion.{part}", count)
    for name, counts in _object("layers", result.get("layers", {})).items():
        for count in _list(f"layers.{name[:80]}", counts, 2):
            _count(f"layers.{name[:80]}", count)
    if "relearning" in result:
        _check_relearning(_object("relearning", result["relearning"]))


def _check_relearning(curve: Mapping[str, Any]) -> None:
    _number_or_null("relearning.steps", curve.get("steps", ""))
    for point in _list("relearning.curve", curve.get("curve")):
        for value in _list("a point of relearning.curve", point, 2):
            _number("relearning.curve", value)


def _check_search(result: Mapping[str, Any], option: str | None, values: Sequence[float]) -> None:
    if result.get("option") != option:
        raise ValueError(f"option must be {option}")
    _number("untouched", result.get("untouched"))
    _number("seconds", result.get("seconds"))
    _check_percentages("expected metrics", result.get("foretold"))
    for value, trial in zip(values, _list("tried", result.get("tried"), len(values)), strict=True):
        trial = _object("a trial", trial)
        _number("the value of a trial", trial.get("value"))
        if trial["value"] != value:
            raise ValueError(f"it tried {trial['value']:g}, but had to try {value:g}")
        if trial.get("reason", "") is not None and not isinstance(trial.get("reason"), str):
            raise ValueError("the reason of a trial must be a text or null")
        if trial.get("score", "") is not None:
            _number("the score of a trial", trial.get("score"))
            _check_percentages("the metrics of a trial", trial.get("figures"))


def _check_percentages(name: str, values: Any) -> None:
    values = _object(name, values)
    for metric in COMPARED:
        _number(f"{metric} of {name}", values.get(metric))


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    return value


def _list(name: str, value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{name} must be a list" + (f" of {length:,}" if length is not None else ""))
    return value


def _number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"{name} must be a finite number")


def _number_or_null(name: str, value: Any) -> None:
    if value is not None:
        _number(name, value)


def _count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must hold counts")
