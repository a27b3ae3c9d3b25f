"""A comparison: its jobs, its table, that it is the same however many processes make it, and that it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from salun.classification import originals
from salun.classification.attacks.mia import FEATURES
from salun.classification.compare import compare, jobs_of, variant_of, variants_of
from salun.classification.experiment import setup_of
from salun.classification.metrics import COMPARED
from salun.classification.preview import preview_comparison
from salun.classification.results import check_result
from salun.classification.search import rounds
from salun.classification.table import difference_lines, lines_of, table_of, tables_of
from salun.classification.unlearn_options import CompareOptions
from salun.config import read_config
from salun.errors import Cancelled, ConfigError, TrainingError
from salun.evaluation.interval import interval
from salun.progress import Event, Stage, silent
from salun.report import charts
from salun.report.classification import _comparison_headline, comparison_page, run_page
from salun.runs.cache import Cache

from .conftest import run_command

QUICK: dict[str, Any] = {"train_epochs": 2, "epochs": 1, "device": "cpu", "search": False, "workers": 1}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short comparison by one process."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    compare(run_dir=folder, methods=["salun", "ft", "ff", "salun@0.1"], seeds=2, relearn=3, **QUICK)
    return folder


def record_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    rows = {name: {k: v for k, v in row.items() if k != "RTE"} for name, row in metrics["methods"].items()}
    return {"methods": rows, "retrain": {k: v for k, v in metrics["retrain"].items() if k != "RTE"}}


def test_a_variant_is_a_method_with_a_mask_or_a_density() -> None:
    assert variant_of("salun").mask is None
    found = variant_of("RL/random@0.25")
    assert (found.method, found.mask, found.density) == ("rl", "random", 0.25)


WRONG = {
    "best": "must have METHOD",
    "retrain": "must have METHOD",
    "salun/good": "must be one of saliency",
    "iu/random": "the method IU has none",
    "salun@0": "must be above 0, at most 1",
    "salun@1.5": "must be above 0, at most 1",
    "salun@1.2.3": "is not a number",
    "ft@0.5": "of a mask that is not full",
    "salun@": "must have METHOD",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_variant_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[text]):
        compare(methods=[text], **QUICK)


@pytest.mark.parametrize("changes", [{"lr": 0.1}, {"method": "ft"}, {"mask": "random"}, {"original": "runs/x"}])
def test_an_option_that_no_comparison_has_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be set for all methods of a comparison"):
        compare(**changes)
    (tmp_path / "wish.yaml").write_text("\n".join(f"{k}: {v}" for k, v in changes.items()), encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be set for all methods of a comparison"):
        read_config(tmp_path / "wish.yaml", CompareOptions)


def test_the_jobs_are_every_method_with_every_seed_and_one_retrain_each() -> None:
    options = CompareOptions(methods=["salun", "ssd"], seeds=3, seed=5, epochs=7, search_seeds=2)
    jobs = jobs_of(options, variants_of(options))
    assert [job.name for job in jobs["retrain"]] == ["retrain-5", "retrain-6", "retrain-7"]
    assert [job.name for job in jobs["again"]] == ["again-5", "again-6", "again-7"]
    assert not jobs_of(CompareOptions(noise_floor=False), variants_of(options))["again"]
    assert {job.name for job in jobs["search"]} == {f"search-{m}-{s}" for m in ("salun", "ssd") for s in (5, 6)}
    assert len(jobs["unlearn"]) == 6
    epochs = {job.variant: job.options.epochs for job in jobs["unlearn"]}
    assert epochs == {"salun": 7, "ssd": None}  # SSD does not train
    with pytest.raises(ConfigError, match="has ft twice"):
        variants_of(CompareOptions(methods=["ft", "ft"]))
    assert variants_of(CompareOptions())[0].name == "salun"
    assert len(variants_of(CompareOptions())) == 17
    assert [v.name for v in variants_of(CompareOptions(forget="class:3"))][17:] == ["unsir"]  # of whole classes only


def test_a_comparison_writes_one_table_and_a_page(made: Path) -> None:
    metrics = record_in(made)["metrics"]
    assert list(metrics["methods"]) == ["salun", "ft", "ff", "salun@0.1"]
    row = metrics["methods"]["ft"]
    assert row["UA"]["n"] == row["gap_mean"]["n"] == 2
    assert row["gap"]["RA"] == pytest.approx(abs(row["RA"]["mean"] - metrics["retrain"]["RA"]["mean"]))
    assert row["gap_paper"] == pytest.approx(sum(row["gap"].values()) / 4)
    assert metrics["differences"]["to"] == "salun"
    assert metrics["differences"]["of"]["ft"]["mean"] == pytest.approx(
        row["gap_mean"]["mean"] - metrics["methods"]["salun"]["gap_mean"]["mean"]
    )
    html = (made / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Metrics",
        "paired by seed",
        "density of the mask",
        "layer by layer",
        "class by class",
        "Relearn",
    ):
        assert heading in html
    assert len(list((made / "jobs").iterdir())) == 2 + 2 + 8


def test_a_retrain_of_another_seed_shows_what_gap_is_chance(made: Path) -> None:
    """It is another model on the very same rows, and as far from Retrain as chance takes it."""
    jobs = {
        name: json.loads((made / "jobs" / f"{name}.json").read_text())["result"] for name in ("retrain-0", "again-0")
    }
    assert jobs["again-0"]["UA"]["n"] == jobs["retrain-0"]["UA"]["n"]
    assert jobs["again-0"]["confusion"] != jobs["retrain-0"]["confusion"]
    metrics = record_in(made)["metrics"]
    gaps = [abs(jobs["again-0"][k]["value"] - jobs["retrain-0"][k]["value"]) for k in ("UA", "RA", "TA", "MIA")]
    assert metrics["again"]["gap_mean"]["values"][0] == pytest.approx(sum(gaps) / 4)
    assert [row[0] for row in lines_of(metrics)[1:4]] == ["original", "Retrain", "Retrain, another seed"]
    assert metrics["original"]["gap_mean"]["mean"] > 0
    html = (made / "report.html").read_text(encoding="utf-8")
    assert "points, which is chance" in html


def test_the_table_is_counted_as_it_is_defined() -> None:
    def figures(ua: float, rest: float = 100.0) -> dict[str, Any]:
        found: dict[str, Any] = {name: {"value": rest} for name in ("RA", "TA", "MIA")}
        features = {"mia_features": {name: {"value": rest} for name in FEATURES}}
        return {**found, **features, "UA": {"value": ua}, "RTE": {"value": 1.0}}

    retrain = {s: {**figures(10.0), "original": figures(0.0)} for s in range(3)}
    results = {
        "a": {0: figures(6), 1: figures(14), 2: figures(10)},
        "b": {0: figures(18), 1: figures(18), 2: {"error": "came apart"}},
    }
    found = table_of(results, retrain, {}, {"a": "A", "b": "B"})
    a, b = found["methods"]["a"], found["methods"]["b"]
    assert (a["gap"]["UA"], a["gap_paper"]) == (0, 0)  # the means meet
    assert a["gap_mean"]["values"] == [1, 1, 0]  # though the seeds do not
    assert b["failed"] == [2]
    assert (b["gap_mean"]["mean"], b["gap_mean"]["n"]) == (2, 2)
    expected = {"mean": 1, "median": 1, "low": 1, "high": 1, "bootstrap": [1, 1], "n": 2}
    assert found["differences"]["of"]["b"] == expected
    assert found["original"]["gap_mean"]["mean"] == 2.5
    assert "10.00 ± 4.00 (0.00)" in lines_of(found)[3]
    assert difference_lines(found)[1][1] == "+1.00"
    assert (lines_of(found)[0][-1], lines_of(found)[3][-1]) == ("search s", "–")  # there was none


def test_a_gap_is_to_retrain_of_the_very_seeds_that_the_method_has() -> None:
    """Retrain's UA is 10 at seeds 0 and 1, and 40 at seed 2, where the method came apart: its gap is 2, not 8."""

    def figures(ua: float) -> dict[str, Any]:
        found: dict[str, Any] = {name: {"value": 100.0} for name in ("RA", "TA", "MIA")}
        features = {"mia_features": {name: {"value": 0.0} for name in FEATURES}}
        return {**found, **features, "UA": {"value": ua}, "RTE": {"value": 1.0}}

    retrain = {s: {**figures(ua), "original": figures(0.0)} for s, ua in enumerate((10.0, 10.0, 40.0))}
    results = {"a": {0: figures(12), 1: figures(12), 2: {"error": "came apart"}}}
    again = {0: figures(13), 1: {"error": "out of memory"}, 2: figures(41)}
    found = table_of(results, retrain, {}, {"a": "A"}, again)
    assert found["methods"]["a"]["gap"]["UA"] == 2
    assert found["methods"]["a"]["why"] == "came apart"
    assert found["again"]["gap"]["UA"] == 2  # of 27 to 25
    assert found["again"]["gap_mean"]["values"] == [0.75, 0.25]


def test_the_bootstrap_is_not_symmetric_where_one_seed_lies_far_out() -> None:
    """Of nine 0 and one 10 the mean is 1; it is never below 0, though t says from −1.26."""
    found = interval([0.0] * 9 + [10.0])
    assert (found["mean"], found["median"]) == (1, 0)
    assert found["low"] < -1
    assert found["bootstrap"][0] == 0
    assert found["bootstrap"][1] == pytest.approx(3, abs=0.01)  # three of ten draws hit it in 5.7 %, four in 1.3 %
    assert found["bootstrap"] == interval([0.0] * 9 + [10.0])["bootstrap"]
    assert interval([1.0])["bootstrap"] is None


def test_the_interval_is_students() -> None:
    """Of 1, 2, 3, 4: mean 2.5, deviation 1.291, t(3) = 3.182, so ± 2.054."""
    found = interval([1, 2, 3, 4])
    assert (found["mean"], found["n"]) == (2.5, 4)
    assert found["high"] - 2.5 == pytest.approx(2.0542, abs=1e-3)
    assert interval([1.0])["low"] is None


@pytest.mark.slow
def test_several_processes_find_the_very_same(made: Path, tmp_path: Path) -> None:
    """Of two of the methods."""
    found = compare(
        run_dir=tmp_path / "two", cache=Cache(tmp_path / "cache"), methods=["ff", "salun@0.1"], seeds=2, relearn=3,
        noise_floor=False, **{**QUICK, "workers": 2},
    )  # fmt: skip
    expected = without_times(record_in(made)["metrics"])
    rows = {name: expected["methods"][name] for name in ("ff", "salun@0.1")}
    assert without_times(found.metrics) == {**expected, "methods": rows}


class Losing(Executor):
    """Runs jobs here, except for one that it loses, as an executor does whose worker died."""

    def __init__(self, lost: int | None = None) -> None:
        self.lost, self.count = lost, 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.count += 1
        if self.count == self.lost:
            future.set_exception(RuntimeError("the worker was lost\nat 127.0.0.1"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_of_the_caller_finds_the_very_same_and_its_loss_of_a_worker_costs_one_job(
    made: Path, tmp_path: Path
) -> None:
    expected = without_times(record_in(made)["metrics"])
    common: dict[str, Any] = {**QUICK, "methods": ["ff", "salun@0.1"], "seeds": 2, "relearn": 3, "noise_floor": False}
    with pytest.raises(TrainingError, match=r"a worker of the executor failed \(RuntimeError: the worker was lost\)"):
        compare(run_dir=tmp_path / "run", executor=Losing(4), **common)
    assert len(results_in(tmp_path)) == 5  # of 6
    second = Losing()
    found = compare(run_dir=tmp_path / "run", resume=True, executor=second, **common)
    assert second.count == 1
    rows = {name: expected["methods"][name] for name in ("ff", "salun@0.1")}
    assert without_times(found.metrics) == {**expected, "methods": rows}


@pytest.mark.packages
def test_two_workers_of_dask_find_the_very_same_though_one_is_killed_during_a_job(made: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    killed: list[int] = []

    def kill(event: Event) -> None:
        busy = [worker for worker, jobs in client.processing().items() if jobs]
        if busy and not killed and event.stage is Stage.UNLEARNING and event.step:
            killed.append(client.run(os.getpid, workers=busy[:1])[busy[0]])
            os.kill(killed[0], signal.SIGKILL)

    common: dict[str, Any] = {**QUICK, "methods": ["ff", "salun@0.1"], "seeds": 2, "relearn": 3, "noise_floor": False}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor(pure=False)
        found = compare(cache=Cache(tmp_path / "cache"), executor=executor, progress=kill, **common)
    assert len(killed) == 1
    expected = without_times(record_in(made)["metrics"])
    rows = {name: expected["methods"][name] for name in ("ff", "salun@0.1")}
    assert without_times(found.metrics) == {**expected, "methods": rows}


def test_a_comparison_that_was_stopped_continues_with_what_is_left(made: Path, tmp_path: Path) -> None:
    done = []

    def stop(event: Event) -> None:
        if event.stage is Stage.UNLEARNING and event.step == 1:
            raise Cancelled("stopped")

    def listen(event: Event) -> None:
        done.append(event.message)

    common: dict[str, Any] = {"methods": ["salun", "ft", "ff", "salun@0.1"], "seeds": 2, "relearn": 3}
    with pytest.raises(Cancelled):
        compare(run_dir=tmp_path / "run", progress=stop, **common, **QUICK)
    assert record_in(tmp_path / "run")["status"] == "cancelled"
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        compare(run_dir=tmp_path / "run", **common, **QUICK)
    with pytest.raises(ConfigError, match="seeds was 2 and is 3"):
        compare(run_dir=tmp_path / "run", resume=True, **{**common, "seeds": 3}, **QUICK)
    jobs = tmp_path / "run" / "jobs"  # results that are damaged, or not by this program, are made again
    last = next(path for path in jobs.iterdir() if not path.stem.startswith(("retrain", "again")))
    last.write_text(json.dumps({**json.loads(last.read_text()), "result": {"UA": {"value": 1}}}), encoding="utf-8")
    (jobs / "retrain-0.json").write_text("{", encoding="utf-8")
    (jobs / "retrain-1.json").write_text("[]", encoding="utf-8")
    (jobs / "again-0.json").write_text("[" * 200_000, encoding="utf-8")
    (jobs / "again-1.json").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(jobs / "again-1.json")
    else:
        (jobs / "again-1.json").write_text('{"key": "", "result": 1}', encoding="utf-8")
    found = compare(run_dir=tmp_path / "run", resume=True, progress=listen, **common, **QUICK)
    assert without_times(found.metrics) == without_times(record_in(made)["metrics"])
    assert len([message for message in done if message]) == 12
    notes = [note for note in found.record.notes if "was not a valid result" in note]
    names = ["retrain-0", "retrain-1", "again-0", "again-1", last.stem]
    assert [note.split()[0] for note in notes] == [f"jobs/{name}.json" for name in names]
    with pytest.raises(ConfigError, match="holds a finished run"):
        compare(run_dir=tmp_path / "run", resume=True, **common, **QUICK)


SEARCHED: dict[str, Any] = {
    "option": "lr", "foretold": dict.fromkeys(COMPARED, 1.0), "untouched": 2.0, "seconds": 0.5,
    "tried": [{"value": 0.1, "score": 1.0, "figures": dict.fromkeys(COMPARED, 1.0), "reason": None},
              {"value": 0.2, "score": None, "figures": None, "reason": "the loss is not finite"}],
}  # fmt: skip


@pytest.mark.parametrize("value", [None, True, "x", -1, 1e308, float("nan"), [], {}, [[1]], {"value": "x"}], ids=repr)
def test_results_of_wrong_types_are_rejected(made: Path, value: Any) -> None:
    """Each part that a table or a page reads, replaced by a value that it cannot have."""
    retrain = json.loads((made / "jobs" / "retrain-0.json").read_text())["result"]
    method = json.loads((made / "jobs" / "salun-0.json").read_text())["result"]
    classes = len(retrain["confusion"]["test"])

    def check(kind: str, result: Any) -> None:
        check_result(kind, result, classes, "lr", (0.1, 0.2))

    for kind, result in (("retrain", retrain), ("unlearn", method), ("search", SEARCHED)):
        check(kind, result)
        parts = {"retrain": ("UA", "original", "mia_features", "confusion", "RTE"), "search": tuple(SEARCHED)}
        for name in parts.get(kind, ("UA", "MIA", "layers", "relearning")):
            if (name, value) in (("layers", {}), ("untouched", -1), ("seconds", -1)):
                continue
            with pytest.raises(ValueError, match=r"must be|must hold|it tried"):
                check(kind, {**result, name: value})
    if value not in (-1, {}, []):
        with pytest.raises(ValueError, match="must"):
            check("unlearn", {**method, "UA": {"value": value}})
    if value != "x":
        with pytest.raises(ValueError, match="error must be a text"):
            check("unlearn", {"error": value})
    check("unlearn", {"error": "the loss is not finite"})


def test_a_seed_at_which_a_method_diverges_is_reported_and_the_rest_stands(tmp_path: Path) -> None:
    found = compare(methods=["bs", "ga"], seeds=1, run_dir=tmp_path / "run", **{**QUICK, "epochs": 100})
    row = found.metrics["methods"]["ga"]
    assert row["failed"] == [0]
    assert row["gap_mean"]["mean"] is None
    assert "ga, seed 0:" in found.record.notes[0]
    assert "–" in lines_of(found.metrics)[5][1]


def test_a_list_of_rows_that_was_changed_is_noticed_on_resume(tmp_path: Path) -> None:
    rows = jobs_of(CompareOptions(), variants_of(CompareOptions()))["unlearn"][0].options
    train = setup_of(replace(rows, train_epochs=1)).split.train
    path, common = tmp_path / "rows.json", {"methods": ["ft"], "seeds": 1}
    path.write_text(json.dumps(train[:20].tolist()), encoding="utf-8")

    def stop(event: Event) -> None:
        if event.step == 1:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        compare(run_dir=tmp_path / "run", forget=str(path), progress=stop, **common, **QUICK)  # type: ignore[arg-type]
    path.write_text(json.dumps(train[20:50].tolist()), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"split was .* and is"):
        compare(run_dir=tmp_path / "run", forget=str(path), resume=True, **common, **QUICK)  # type: ignore[arg-type]


def test_a_method_that_cannot_be_done_is_a_row_that_says_so_and_ends_nothing(tmp_path: Path) -> None:
    """IU divides by a damping that is 0 in float32, at whatever value of the search."""
    settings = {**QUICK, "search": True, "search_seeds": 1, "damping": 1e-50, "gradients": 8}
    found = compare(methods=["ft", "iu"], seeds=2, run_dir=tmp_path / "run", **settings)
    rows = found.metrics["methods"]
    assert rows["ft"]["gap_mean"]["n"] == 2
    assert rows["iu"]["failed"] == [0, 1]
    assert rows["iu"]["search"]["chosen"] is None
    assert "the influence is not finite" in rows["iu"]["search"]["tried"][0]["reason"]
    assert "the search found no value" in rows["iu"]["why"]
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Without a result: IU" in html
    assert ["IU", "influence", "none"] in [row[:3] for row in tables_of(found.metrics)["The search"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["ft", "scrub"], "epochs": 1}, "epochs is 1, but SCRUB begins to forget in its second epoch"),
        ({"methods": ["ft", "ssd"], "ssd_alpha": 5000.0}, "no weight can be more than"),
        (
            {"methods": ["ft"], "validation_share": 0.0, "search": True},
            "needs validation images, but the split has none",
        ),
        ({"methods": ["ft"], "validation_share": 0.002, "search": True}, "search needs 4 validation images"),
    ],
)
def test_what_no_seed_could_do_is_refused_before_anything_is_trained(changes: dict[str, Any], message: str) -> None:
    def never(event: Event, /) -> None:
        raise AssertionError(f"{event.stage} began")

    options = CompareOptions(**{**QUICK, **changes})
    for way in (compare, preview_comparison):
        with pytest.raises(ConfigError, match=message):
            way(options, progress=never)


def ranked(outcomes: dict[str, tuple[float, bool]]) -> dict[str, Any]:
    """A table of methods with a gap each, three seeds alike, and whether their search found them to do nothing."""

    def figures(gap: float) -> dict[str, Any]:
        found: dict[str, Any] = {name: {"value": 100.0} for name in ("UA", "RA", "TA", "MIA")}
        found["UA"] = {"value": 100.0 - 4 * gap}
        return {**found, "mia_features": {name: {"value": 1.0} for name in FEATURES}, "RTE": {"value": 1.0}}

    exact = {seed: {**figures(0), "original": figures(9)} for seed in range(3)}
    results = {name: {seed: figures(gap) for seed in range(3)} for name, (gap, _) in outcomes.items()}
    searched = {
        name: {
            "chosen": 1.0,
            "untouched": 5.0,
            "tried": [{"value": 1.0, "score": 5.0 if idle else 2.0}],
            "seconds": 1.0,
        }
        for name, (_, idle) in outcomes.items()
    }
    return table_of(results, exact, searched, {name: f"The {name}" for name in outcomes}, exact)


def test_a_method_that_did_nothing_has_no_place() -> None:
    """By the search, however near to Retrain it comes by chance."""
    from benchmarks.classify import verdict

    table = ranked({"salun": (2.0, False), "rl": (3.0, False), "ft": (1.0, True)})
    lines = _comparison_headline(table)
    assert lines[0].startswith("Nearest to Retrain over 3 seeds: The salun, with a gap of 2.00 percentage points")
    assert "Not ranked, since the search found no effect: The ft." in lines
    text = verdict("x", table)
    assert (
        "SalUn (2.00) ranks 1 of 2. Nearest: The salun 2.00, The rl 3.00. Not ranked, since the search "
        "found no effect: The ft" in text
    )
    assert (
        "of 1 comparisons, uncorrected, significantly nearer than SalUn: none; significantly farther: The rl." in text
    )
    table = ranked({"salun": (1.0, True), "rl": (3.0, False)})
    assert "SalUn is not ranked: at its best value" in verdict("x", table)
    assert "significantly" not in verdict("x", table)


def test_the_benchmark_tries_the_values_that_its_results_were_made_with() -> None:
    """Whatever the methods' defaults have become since."""
    from benchmarks.classify import CENTERS, folder_of, grids_of_the_runs, settings

    done = 0
    for name, options in settings().items():
        path = folder_of(name) / "run.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))["metrics"]["methods"]
        with grids_of_the_runs():
            jobs = [job for job in jobs_of(options, variants_of(options))["unlearn"] if job.options.seed == 0]
            for job in jobs:
                if job.options.method in CENTERS:
                    first = next(rounds(setup_of(job.options).options))
                    tried = [trial["value"] for trial in rows[job.variant]["search"]["tried"]]
                    assert all(any(value == pytest.approx(one) for one in tried) for value in first), (name, job.name)
        done += 1
    assert done


def test_the_benchmark_of_cifar10_compares_from_its_trained_originals_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import cifar10

    for i in range(40):
        path = tmp_path / "data" / ("train" if i < 30 else "test") / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(path)
    data, out, threads = str(tmp_path / "data"), tmp_path / "out", torch.get_num_threads()
    monkeypatch.setitem(cifar10.RECIPE, "train_epochs", 1)
    try:
        cifar10.train_originals(data, out, [cifar10.FIRST_SEED], [])
        monkeypatch.setattr(originals, "train_from_scratch", None)  # not called
        options = cifar10.comparison(data, "random:0.5", 1, ["ft"], 1)
        (job,) = jobs_of(options, variants_of(options))["unlearn"]
        assert setup_of(job.options, Cache(out / "cache")).original(silent).model is not None
    finally:
        torch.set_num_threads(threads)
    assert cifar10.page(tmp_path).count("Not measured yet.\n") == len(cifar10.SETTINGS)


def test_want_of_memory_fails_one_job_and_resuming_does_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in for the kernel's refusal is torch's own error, raised where IU would take its memory."""
    from salun.classification import curvature

    def full(*_: object) -> None:
        raise MemoryError("not enough memory: you tried to allocate 4 GB")

    def stop(event: Event) -> None:
        if event.message and event.message.startswith("ft"):
            raise Cancelled("stopped")

    settings = {**QUICK, "methods": ["iu", "ft"], "seeds": 1, "gradients": 8}
    with monkeypatch.context() as patch:
        patch.setattr(curvature, "influence", full)
        found = compare(**settings)
        assert "out of memory" in found.metrics["methods"]["iu"]["why"]
        assert found.metrics["methods"]["ft"]["gap_mean"]["n"] == 1
        with pytest.raises(Cancelled):
            compare(run_dir=tmp_path / "run", progress=stop, **settings)
    found = compare(run_dir=tmp_path / "run", resume=True, **settings)
    assert found.metrics["methods"]["iu"]["failed"] == []


def test_every_seed_of_a_search_tries_the_same_values_and_its_end_is_reported(tmp_path: Path) -> None:
    found = compare(methods=["ft"], seeds=3, search_seeds=2, run_dir=tmp_path / "run", **{**QUICK, "search": True})
    summary = found.metrics["methods"]["ft"]["search"]
    jobs = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "jobs").glob("search-*.json"))]
    values = {(job["options"]["seed"]): [] for job in jobs}
    for job in jobs:
        values[job["options"]["seed"]] += [trial["value"] for trial in job["result"]["tried"]]
        tried = [trial["value"] for trial in job["result"]["tried"]]
        check_result("search", job["result"], 0, summary["option"], tried)
    assert all(len(job["result"]["tried"]) == 1 for job in jobs)  # a killed one loses no other's training
    assert sorted(values) == [0, 1]
    assert sorted(values[0]) == sorted(values[1]) == [trial["value"] for trial in summary["tried"]]
    assert summary["runs"] == 2 * len(summary["tried"]) > 2 * 5
    assert summary["chosen"] in [trial["value"] for trial in summary["tried"] if trial["score"] is not None]
    row = tables_of(found.metrics)["The search"][1]
    assert row[5] == (summary["remark"] or "")


@pytest.mark.slow
def test_a_small_comparison_finds_rates_by_itself() -> None:
    """The search is reported and counted apart; after it the methods are near Retrain, and nearer than the original."""
    found = compare(
        methods=["salun", "rl"], seeds=1, search_seeds=1, device="cpu", workers=1, forget="class:3", epochs=3,
        noise_floor=False,
    )  # fmt: skip
    for row in found.metrics["methods"].values():
        assert row["search"]["runs"] >= 5
        assert row["search"]["seconds"] > 0
    original = found.metrics["original"]
    exact = found.metrics["retrain"]
    far = sum(abs(original[k]["mean"] - exact[k]["mean"]) for k in ("UA", "RA", "TA", "MIA")) / 4
    assert far > 40  # Retrain does not know the class at all, the original all of it
    assert all(row["gap_mean"]["mean"] < 5 for row in found.metrics["methods"].values())


def test_a_dry_run_tells_the_jobs_and_writes_nothing(tmp_path: Path) -> None:
    options = CompareOptions(methods=["salun", "ft"], seeds=3, device="cpu")
    found = preview_comparison(options, run_dir=tmp_path / "run")
    jobs = {"retrain": 3, "again": 3, "search": 4, "unlearn": 6}
    assert {kind: some["all"] for kind, some in found["jobs"].items()} == jobs
    assert found["seconds"] > 0
    assert not list(tmp_path.iterdir())


# -- the page ------------------------------------------------------------------------------------------------------

EVIL = '<script>alert("1")</script>'


def evil(value: Any) -> Any:
    """The same with every text replaced, but for the names that the page itself asks for."""
    if isinstance(value, dict):
        return {key: evil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [evil(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_a_page_escapes_everything_and_fetches_nothing(made: Path, tmp_path: Path) -> None:
    data = evil(record_in(made))
    names = list(record_in(made)["metrics"]["methods"])
    data["metrics"]["methods"] = {EVIL + str(i): row for i, row in enumerate(data["metrics"]["methods"].values())}
    data["notes"], data["facts"][EVIL] = [EVIL], EVIL
    jobs = {path.stem: json.loads(path.read_text())["result"] for path in (made / "jobs").iterdir()}
    results = {EVIL + str(i): {s: jobs[f"{n.replace('@', '-')}-{s}"] for s in (0, 1)} for i, n in enumerate(names)}
    for some in results.values():
        for result in some.values():
            result["layers"] = {EVIL + k: v for k, v in result["layers"].items()}
    rows = {name: {"method": EVIL, "mask": EVIL, "density": 0.1 * i + 0.1} for i, name in enumerate(results)}
    retrain = {s: jobs[f"retrain-{s}"] for s in (0, 1)}
    pages = [comparison_page(data, {EVIL: [[EVIL], [EVIL]]}, rows, results, retrain, [EVIL] * 10).html]
    from salun.classification.experiment import unlearn

    run = unlearn(relearn=2, search=True, train_epochs=1, epochs=1, device="cpu").record.as_json()
    options = {**dict.fromkeys(run["options"], EVIL), EVIL: EVIL}
    shown = {**run, "options": options, "device": EVIL, "command": EVIL, "notes": [EVIL], "facts": {EVIL: EVIL}}
    shown["search"] = {**run["search"], "option": EVIL}
    pages.append(run_page(shown, {EVIL: (1, 2)}, [EVIL] * 10).html)
    for html in pages:
        assert "<script" not in html
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
        assert "@import" not in html


def test_curves_hold_with_awkward_numbers() -> None:
    assert charts.curves({}, "x", "y") == ""
    flat = charts.curves({"a": [(1.0, 5.0)], "b": []}, "x", "y")
    assert "nan" not in flat
    assert "<circle" in flat
    many = charts.curves({"a": [(float(i), float(i * i)) for i in range(200)]}, "x", "y")
    assert "<circle" not in many
    assert "200" not in charts.heat([[0, 0], [0, 0]], ["a", "b"], "t")


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_tells_the_table(tmp_path: Path) -> None:
    quick = [
        "--methods",
        "ft",
        "--methods",
        "ga",
        "--seeds",
        "1",
        "--no-search",
        "--train-epochs",
        "1",
        "--epochs",
        "1",
    ]
    done = run_command("classify-compare", *quick, "--workers", "1", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "comes nearest to Retrain: a mean gap of" in lines[0]  # the verdict
    top = next(i for i, line in enumerate(lines) if line.split()[:5] == ["method", "UA", "%", "RA", "%"])
    assert [line.split()[0] for line in lines[top + 1 : top + 6]] == ["original", "Retrain", "Retrain,", "FT", "GA"]
    assert (tmp_path / "run" / "report.html").is_file()
    (tmp_path / "wish.yaml").write_text("methods: [ft]\nseeds: 2\n", encoding="utf-8")
    dry = run_command("classify-compare", "--config", "wish.yaml", "--dry-run", "--json", cwd=tmp_path)
    found = json.loads(dry.stdout)
    assert (found["methods"], found["seeds"]) == (["ft"], [0, 1])


def stopped(how: signal.Signals, folder: Path, *arguments: str, worker: bool = False) -> tuple[int, str]:
    """Starts a comparison by two processes, stops it when it has one more result, and gives its exit code and stderr.

    None of its processes outlives it. worker: stop one of the processes that it started instead.
    """
    before = results_in(folder)
    command = [sys.executable, "-m", "salun", "classify-compare", *arguments, "--run-dir", "run", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while results_in(folder).keys() == before.keys():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = children_of(process.pid)
        assert children
        workers = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        os.kill(workers[0] if worker else process.pid, how)
        rest = process.communicate(timeout=60)[1]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "worker processes outlived the comparison"
        time.sleep(0.1)
    return process.returncode, rest


def results_in(folder: Path) -> dict[str, int]:
    """When each job's result was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "jobs").glob("*.json")}


@pytest.mark.slow
def test_a_killed_comparison_resumes_and_leaves_no_process(tmp_path: Path) -> None:
    """Interrupted, killed, bereft of a worker, and resumed each time: what was there is not made anew."""
    arguments = ["--methods", "ft", "--methods", "ga", "--seeds", "2", "--no-search", "--train-epochs", "8"]
    code, rest = stopped(signal.SIGINT, tmp_path, *arguments, "--epochs", "3")
    assert code == 130
    assert rest.splitlines()[-1].endswith("resume with: salun classify-compare --resume --run-dir run")
    interrupted = results_in(tmp_path)
    code, _ = stopped(signal.SIGKILL, tmp_path, "--resume")
    assert code == -signal.SIGKILL
    killed = results_in(tmp_path)
    assert interrupted.items() < killed.items() and len(killed) < 8
    code, rest = stopped(signal.SIGKILL, tmp_path, "--resume", worker=True)
    assert (
        code == 1 and "a process of the comparison was killed" in rest and "Use --resume with fewer --workers" in rest
    )
    bereft = results_in(tmp_path)
    assert killed.items() < bereft.items() and len(bereft) < 8
    again = run_command("classify-compare", "--resume", "--run-dir", "run", "--workers", "1", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "done"
    assert bereft.items() < results_in(tmp_path).items() and len(results_in(tmp_path)) == 8


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    if not tasks.is_file():
        pytest.skip("needs Linux's /proc")
    return [int(child) for child in tasks.read_text().split()]
