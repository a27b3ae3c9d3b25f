"""`salun compare`: methods side by side, on equal terms."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from salun.diffusion.compare import compare, next_value
from salun.diffusion.compare_estimate import preview_comparison
from salun.diffusion.compare_jobs import jobs_of
from salun.diffusion.compare_options import CompareOptions, variant_of
from salun.diffusion.compare_table import Result, cells_of, table_of
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import Cancelled, ConfigError
from salun.progress import Event, silent

from .conftest import SHORT, run_command

FEW: dict[str, Any] = {**SHORT, "eval_images": 2, "device": "cpu"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sa", "begins with none of salun"),
        ("esd+mask", "must have OPTION=VALUE"),
        ("esd+colour=red", "unknown option"),
        ("esd+steps=many", "steps"),
        ("esd+steps=0", "steps"),
    ],
)
def test_a_variant_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        variant_of(text)


def test_a_variant_is_a_method_with_its_own_options() -> None:
    assert variant_of(" esd+mask=saliency+negative-guidance=2 ").options == {
        "method": "esd", "mask": "saliency", "negative_guidance": 2,
    }  # fmt: skip
    options = CompareOptions(concept=["circle", "red"], anchor=["square", "orange"], methods=["uce", "esd"], seeds=2)
    assert [job.name for job in jobs_of(options)][:5] == [
        "circle-uce-0", "circle-esd-0", "red-uce-0", "red-esd-0", "circle-uce-1",
    ]  # fmt: skip
    for wrong in ({"methods": ["uce", "uce"]}, {"mask": "random"}, {"anchor": ["square"]}):
        with pytest.raises(ConfigError):
            _ = CompareOptions(**{"concept": ["circle", "red"], **wrong}).variants


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [1, 1 / 3, 3]),
        (3.0, [1, 1 / 3, 3, 9]),
        (9.0, [1, 1 / 3, 3, 9, 27]),
        (1 / 27, [1, 1 / 3, 3, 1 / 9, 1 / 27]),
    ],
)
def test_a_search_goes_on_beyond_the_best_value_while_it_is_at_an_end(best: float, tried: list[float]) -> None:
    scores: dict[float, float] = {}
    while (value := next_value(scores, 1.0)) is not None:
        scores[value] = -abs(value - best)
    assert list(scores) == pytest.approx(tried)


def test_the_table_has_means_and_differences_on_equal_concepts_and_seeds() -> None:
    def result(variant: str, concept: str, seed: int, score: float) -> Result:
        return Result("", variant, concept, seed, {"score": score, "ua": score}, "erased")

    results = [result("salun", "circle", s, 90 + s) for s in range(3)] + [result("salun", "red", 0, 50)]
    results += [result("uce", "circle", s, 80 + s) for s in range(3)]
    results += [Result("", "uce", "red", 0, error="does not fit")]
    table = table_of([variant_of("salun"), variant_of("uce")], results)
    assert table["uce"]["difference"] == pytest.approx({"value": -10, "n": 3, "low": -10, "high": -10})
    assert table["uce"]["ua"] == {"mean": 81, "std": 1, "n": 3} and table["uce"]["runs"] == 3
    assert table["salun"]["difference"] is None and table["salun"]["ra"] is None
    head, first, second = cells_of(table)
    assert (head[0], first[0], second[0]) == ("method", "UCE", "SalUn"), "the best mean is first"
    assert first[1] == "81.0 ± 1.0" and first[-1] == "3 erased" and first[-2] == "-10.0 (-10.0 to -10.0)"


@pytest.mark.slow
def test_methods_are_compared_on_equal_terms_and_a_stopped_comparison_resumes(shapes: Model, tmp_path: Path) -> None:
    methods = ["salun", "esd+batch_size=1", "uce", "speed+speed_threshold=0.9", "salun+density=1e-9"]
    options = CompareOptions(concept=["circle"], anchor=["square"], methods=methods, seeds=1, **FEW)

    def stop(event: Event) -> None:
        if event.job == 3:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        compare(options, model=shapes, progress=stop, run_dir=tmp_path / "c")
    before = (tmp_path / "c" / "jobs" / "circle-salun-0" / "run.json").stat().st_mtime_ns
    planned = preview_comparison(options, tmp_path / "c", model=shapes)
    assert [job["done"] for job in planned["jobs"]] == [True, True, False, False, False]
    assert 0 < planned["least"] <= planned["most"] < sum(job["most"] for job in planned["jobs"])
    resumed = run_command("compare", "--resume", "--run-dir", "c", "--json", cwd=tmp_path)  # its options are recorded
    done = json.loads(resumed.stdout)
    assert (tmp_path / "c" / "jobs" / "circle-salun-0" / "run.json").stat().st_mtime_ns == before
    steps = {
        name: len(json.loads((tmp_path / "c" / "jobs" / f"circle-{name}-0" / "run.json").read_bytes())["losses"])
        for name in ("salun", "esd-batch_size=1", "uce")
    }
    # a step of SalUn: 8 samples forward, 8 forward and back; of ESD: 51 passes forward, one forward and back
    assert [job["steps"] for job in planned["jobs"][:3]] == list(steps.values())
    assert steps == {"salun": 4, "esd-batch_size=1": round(4 * (8 + 8 * 3) / (51 + 3)), "uce": 0}
    table = done["metrics"]
    assert table["uce"]["ua"]["n"] == 1 and table["uce"]["difference"]["n"] == 1
    assert table["salun+density=1e-9"]["runs"] == 0 and "selects none" in done["notes"][0]
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "Trade-off" in page and "SPEED (speed_threshold 0.9)" in page
    rows = list(csv.DictReader((tmp_path / "c" / "compare.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["method"] for row in rows] == methods and rows[2]["seed"] == "0" and float(rows[2]["ua"]) >= 0


@pytest.mark.parametrize("content", ["[", "[1]", '{"uce": 5}', '{"uce": {"lr": "x"}}', '{"uce": {"no": 1}}'])
def test_a_search_that_no_comparison_wrote_is_rejected(content: str, shapes: Model, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(content, encoding="utf-8")
    options = CompareOptions(concept=["circle"], methods=["uce"], seeds=1, budget="tuned", **FEW)
    with pytest.raises(ConfigError, match=r"search\.json"):
        compare(options, model=shapes, progress=silent, run_dir=tmp_path)


@pytest.mark.slow
def test_a_search_sees_training_prompts_alone(shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is an erasure with another value, evaluated on prompts that it was trained with."""
    seen: list[tuple[float, set[str]]] = []
    from salun.diffusion import compare as module

    def unlearn(context: Any) -> Any:
        seen.append((context.plan.options.uce_erase, {p.text for p in context.plan.prompts.concepts[0].eval_forget}))
        return original(context)

    original = module.unlearn
    monkeypatch.setattr(module, "unlearn", unlearn)
    options = CompareOptions(concept=["circle"], methods=["uce"], seeds=1, budget="tuned", **FEW)
    done = compare(options, model=shapes, progress=silent, run_dir=tmp_path / "c")
    values = [value for value, _ in seen]
    assert len(values) >= 3 and values[:3] == pytest.approx([1, 1 / 3, 3])
    job = json.loads((tmp_path / "c" / "jobs" / "circle-uce-0" / "run.json").read_bytes())
    assert job["options"]["uce_erase"] == done.record.more["searched"]["uce"]["uce_erase"] in values
    from salun.diffusion.plan import make_plan

    prompts = make_plan(shapes.settings, shapes.name, "circle", options.options).prompts.concepts[0]
    assert all(texts == {p.text for p in prompts.forget} for _, texts in seen)
    assert not seen[0][1] & {p.text for p in prompts.eval_forget}


def test_attacks_are_a_column_of_the_table(shapes: Model, tmp_path: Path) -> None:
    """UCE erases this concept well, and doing nearly nothing does not; the same attack is made on both."""
    few = {"eval_images": 2, "attack": ["merge+fraction=1", "quantize"], "attacked": 8, "device": "cpu"}
    options = CompareOptions(
        concept=["circle"], methods=["uce", "uce+uce-erase=0.0001"], seeds=1, sampling_steps=8, **few
    )
    comparison = compare(options, model=shapes, progress=silent, run_dir=tmp_path / "c")
    erased, unchanged = comparison.table["uce"], comparison.table["uce+uce-erase=0.0001"]
    assert erased["asr"]["mean"] == unchanged["asr"]["mean"] > 50, "a merge that is all of the original"
    (row, other) = csv.DictReader((tmp_path / "c" / "compare.csv").read_text(encoding="utf-8").splitlines())
    assert float(row["ASR merge+fraction=1"]) > 50 > float(row["ASR quantize"])
    assert float(other["ASR quantize"]) > 50
    with pytest.raises(ConfigError, match="must be one of"):
        CompareOptions(concept=["circle"], attack=["none"])
