"""`salun compare`: methods side by side, on equal terms."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import salun
from salun.diffusion import compare_search
from salun.diffusion.compare import compare
from salun.diffusion.compare_estimate import preview_comparison
from salun.diffusion.compare_folder import comparison_record, erasure_of
from salun.diffusion.compare_jobs import job_options, jobs_of, paper_notes, plans_of, with_methods
from salun.diffusion.compare_options import CompareOptions, variant_of
from salun.diffusion.compare_search import next_value, stored_searches
from salun.diffusion.compare_table import Result, attack_cells, cells_of, table_of
from salun.diffusion.model.settings import read_settings
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import make_plan
from salun.errors import Cancelled, ConfigError
from salun.methods import METHODS
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
        ("esd+seed=3", "seed must be equal for all methods. Use seed for the comparison instead"),
        ("esd+device=cpu", "device must be equal"),
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
def test_a_search_continues_beyond_the_best_value_while_it_is_at_an_end(best: float, tried: list[float]) -> None:
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
    results[4] = replace(results[4], values={"score": 77.0})
    few = table_of([variant_of("salun"), variant_of("uce")], results)["uce"]["difference"]
    assert (few["value"], few["high"]) == pytest.approx((-11, -11 + 4.303), abs=1e-3), "by Student's t of three pairs"
    assert table["uce"]["ua"] == {"mean": 81, "std": 1, "n": 3} and table["uce"]["runs"] == 3
    assert table["salun"]["difference"] is None and table["salun"]["ra"] is None
    head, first, second = cells_of(table)
    assert (head[0], first[0], second[0]) == ("method", "UCE", "SalUn"), "the best mean is first"
    assert first[1] == "81.0 ± 1.0" and first[-1] == "3 erased" and first[-2] == "-10.0 (-10.0 to -10.0)"
    assert head[1] == "UA × (1 − image drift), %" and head[-2] == "difference in UA × (1 − image drift)", (
        "RA is unknown"
    )
    rates = {"ASR seeds": 10.0, "ASR inversion": 40.0, "asr": 40.0, "ra": 90.0}
    attacked = [replace(each, values={**each.values, **rates}) if each.variant == "uce" else each for each in results]
    table = table_of([variant_of("salun"), variant_of("uce")], attacked)
    of_uce = ["UCE", "10.0 ± 0.0", "40.0 ± 0.0"]
    assert attack_cells(table) == [["method", "seeds", "inversion"], ["SalUn", "–", "–"], of_uce]
    head, _, second = cells_of(table)
    assert second[head.index("ASR of the best attack, %")] == "40.0 ± 0.0 (inversion)"
    assert head[1] == "UA × RA or (1 − image drift), %"


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
    assert done["failed"] == ["circle-salun-density=1e-9-0"]
    assert table["salun"]["passes"]["mean"] > 4 * (8 + 8 * 3) > table["uce"]["passes"]["mean"] == 0
    again = run_command("compare", "--resume", "--run-dir", "c", cwd=tmp_path)
    assert "note: circle-salun-density=1e-9-0: " in again.stdout, "what failed is tried again"
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "Trade-off" in page and "SPEED (speed_threshold 0.9)" in page
    rows = list(csv.DictReader((tmp_path / "c" / "compare.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["method"] for row in rows] == methods and rows[2]["seed"] == "0" and float(rows[2]["ua"]) >= 0


def test_what_a_comparison_sets_for_all_reaches_the_methods_that_read_it(shapes: Model) -> None:
    """And what a variant sets without effect, or wrongly, is an error that names the variant."""
    methods = ["salun", "uce", "esd+mask=saliency", "erasediff"]
    shared = {"lr": 1e-3, "retain_weight": 2.0, "density": 0.1, "negative_guidance": 2.0, "forget_latents": 8}
    options = CompareOptions(concept=["circle"], methods=methods, seeds=1, **shared)
    salun, uce, esd, erasediff = (job_options(shapes, options, job, {}) for job in jobs_of(options))
    assert (salun.lr, salun.retain_weight, salun.density, salun.negative_guidance) == (1e-3, 2.0, 0.1, 1.0)
    assert (uce.lr, uce.steps, uce.batch_size, uce.forget_latents) == (None, None, None, None)
    assert (esd.retain_weight, esd.density, esd.negative_guidance) == (None, 0.1, 2.0)
    assert (erasediff.lr, erasediff.density, erasediff.forget_latents) == (1e-3, 0.5, 8)
    for variant, message in (
        ("uce+lr=1e-3", "methods has uce[+]lr=1e-3, whose lr is 0.001, but has no effect with the method uce. Omit lr"),
        ("esd+recipe=paper", "methods has esd[+]recipe=paper, whose recipe is paper, but the paper has no recipe"),
    ):
        with pytest.raises(ConfigError, match=message):
            plans_of(shapes, options, jobs_of(replace(options, methods=[*methods, variant])))
    with pytest.raises(ConfigError, match=r"lr is 0[.]001, but has no effect with any of the methods compared"):
        jobs_of(replace(options, methods=["uce", "speed"]))


def test_budget_paper_takes_the_numbers_that_there_are(shapes: Model) -> None:
    """Of Stable Diffusion also SalUn's; the bundled model has none, so all take equal passes there."""
    options = CompareOptions(concept=["circle"], methods=["salun", "esd", "ca", "uce"], seeds=1, budget="paper")
    equal = replace(options, budget="equal-steps")
    jobs = jobs_of(options)
    plans = plans_of(shapes, options, jobs)
    assert [plan.recipe for plan in plans] == [plan.recipe for plan in plans_of(shapes, equal, jobs)]
    assert paper_notes(options, jobs, plans)[0].endswith("steps: salun, esd, ca")
    assert not paper_notes(equal, jobs, plans)
    papers = read_settings(None, "sd1", {})
    assert papers.paper_recipes
    before, shapes.settings = shapes.settings, replace(papers, vocabulary=None)
    try:
        jobs = jobs_of(replace(options, concept=["nudity"]))
        plans = plans_of(shapes, options, jobs)
        salun = papers.paper_recipes[plans[0].concepts[0].kind]
        assert (plans[0].recipe.steps, plans[0].recipe.lr) == (salun.steps, salun.lr) and plans[0].goal is None
        assert plans[1].recipe.steps == METHODS["diffusion"]["esd"].paper_recipe["steps"]
        assert paper_notes(options, jobs, plans)[0].endswith("steps: ca")
    finally:
        shapes.settings = before


def test_by_default_a_class_conditional_model_is_compared_by_the_methods_that_it_takes() -> None:
    model = salun.load("digits", device="cpu")
    options, (note,) = with_methods(model, CompareOptions(concept=["class:3"]))
    assert "uce" not in options.methods and "salun" in options.methods and "uce, rece, speed" in note
    plans_of(model, options, jobs_of(options))
    paper = replace(options, methods=["salun", "ant"], budget="paper")
    (note,) = paper_notes(paper, jobs_of(paper)[:2], plans_of(model, paper, jobs_of(paper)[:2]))
    assert note.endswith("steps: ant"), "its numbers are of Stable Diffusion"
    with pytest.raises(ConfigError, match="methods has uce, whose method is uce, which edits cross-attention"):
        plans_of(model, options, jobs_of(replace(options, methods=["uce"])))


# -- a folder that holds something else ----------------------------------------------------------------------------


UCE: dict[str, Any] = {
    "concept": ["circle"], "anchor": ["square"], "methods": ["uce"], "seeds": 1, "eval_images": 2, "device": "cpu",
    "sampling_steps": SHORT["sampling_steps"],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of one erasure."""
    folder = tmp_path_factory.mktemp("finished") / "c"
    compare(CompareOptions(**UCE), model=shapes, progress=silent, run_dir=folder)
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same, stopped when its erasure was done."""
    folder = Path(shutil.copytree(finished, tmp_path / "c"))
    edit(folder / "run.json", status="cancelled")
    return folder


def edit(path: Path, **parts: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | parts), encoding="utf-8")


def job(folder: Path) -> Path:
    return folder / "jobs" / "circle-uce-0"


def metric(name: str, value: Any) -> Callable[[Path], None]:
    """An edit of a metric of the erasure."""

    def change(folder: Path) -> None:
        path = job(folder) / "run.json"
        edit(path, metrics={**json.loads(path.read_bytes())["metrics"], name: value})

    return change


def option(**values: Any) -> Callable[[Path], None]:
    """An edit of an option of the erasure."""

    def change(folder: Path) -> None:
        path = job(folder) / "run.json"
        edit(path, options={**json.loads(path.read_bytes())["options"], **values})

    return change


def another_model(folder: Path) -> None:
    path = job(folder) / "run.json"
    edit(path, facts={**json.loads(path.read_bytes())["facts"], "model": 64 * "0"})


def truncated(folder: Path) -> None:
    path = job(folder) / "run.json"
    path.write_bytes(path.read_bytes()[:500])


def linked_folder(folder: Path) -> None:
    job(folder).rename(folder.parent / "elsewhere")
    job(folder).symlink_to(folder.parent / "elsewhere")


def linked_images(folder: Path) -> None:
    (job(folder) / "before_after.png").unlink()
    (job(folder) / "before_after.png").symlink_to(folder / "run.json")


def linked_table(folder: Path) -> None:
    (folder / "compare.csv").unlink()
    (folder / "compare.csv").symlink_to(folder / "run.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "circle-uce-0/run.json, which this comparison did not write: "),
        (lambda folder: edit(job(folder) / "run.json", status="over"), "circle-uce-0/run.json, which this .*status"),
        (another_model, "circle-uce-0, which this .*model 'shapes' has the content .*, but 'shapes' had 0000"),
        (option(seed=5), "circle-uce-0, which this .*seed was 5 and is 0"),
        (option(concept=["red"]), "circle-uce-0, which this .*concept was"),
        (option(uce_erase=9.0), "circle-uce-0, which this .*uce_erase was 9.0 and is 1.0"),
        (lambda folder: edit(job(folder) / "run.json", metrics={}), "run.json, which this .*it has no verdict"),
        (lambda folder: edit(job(folder) / "run.json", rounding=None), "run.json, which this comparison did not write"),
        (lambda folder: edit(job(folder) / "run.json", rounding={"changed": 1e12}), "changed is 1e[+]12, but must be"),
        (metric("ua", {"value": "99"}), "ua is '99', which is not a number"),
        (metric("ua", {"value": True}), "ua is 'True', which is not a number"),
        (metric("ua", {"value": 1e9}), r"ua is 1e\+09, but must be from -1000 to 1000"),
        (metric("ua", [99]), "run.json, which this comparison did not write"),
        (metric("ra_by_attribute", [1]), "ra_by_attribute is not an object"),
        (metric("ra_by_attribute", {"shape": "100"}), "run.json, which this comparison did not write"),
        (metric("verdict", {"outcome": ["erased"]}), "verdict is not a text"),
        (linked_folder, "circle-uce-0, which this comparison did not write: it is a link"),
        (linked_images, "circle-uce-0, which this .*before_after.png in it is a link"),
        (linked_table, "compare.csv in it is a link"),
        (lambda folder: (folder / "run.json").write_text("{", encoding="utf-8"), "run.json is not a valid record"),
        (lambda folder: edit(folder / "run.json", seed="first"), "seed is"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_or_foreign_part_of_a_comparison_is_rejected_in_one_line(
    damage: Callable[[Path], None], message: str, shapes: Model, stopped: Path
) -> None:
    damage(stopped)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and path.name != "log.txt"}
    table = stopped / "report.html", stopped / "compare.csv"
    with pytest.raises(ConfigError, match=message) as error:
        compare(CompareOptions(**UCE), model=shapes, progress=silent, run_dir=stopped, resume=True)
    assert "\n" not in str(error.value)
    assert all(path.read_bytes() == before[path] for path in table if path in before), "no table is written"


def test_a_job_that_was_removed_is_made_again(shapes: Model, stopped: Path) -> None:
    shutil.rmtree(job(stopped))
    compare(CompareOptions(**UCE), model=shapes, progress=silent, run_dir=stopped, resume=True)
    assert json.loads((job(stopped) / "run.json").read_bytes())["status"] == "done"


# -- the search ----------------------------------------------------------------------------------------------------


TUNED = CompareOptions(**{**UCE, "budget": "tuned"})


@pytest.mark.parametrize(
    "tried",
    [
        5,
        {"esd": []},
        {"uce": 5},
        {"uce": [[1.0]]},
        {"uce": [["1", 50.0]]},
        {"uce": [[1.0, True]]},
        {"uce": [[1.0, -5]]},
        {"uce": [[1.0, 1e300]]},
        {"uce": [[2.0, 50.0]]},
        {"uce": [[1.0, 90.0], [1 / 3, 80.0], [3.0, 80.0], [9.0, 70.0]]},
    ],
)
def test_a_search_that_no_comparison_made_is_rejected(tried: Any, shapes: Model, tmp_path: Path) -> None:
    """The last one goes on after its end."""
    key = comparison_record(shapes, TUNED, tmp_path).fingerprint
    (tmp_path / "search.json").write_text(json.dumps({"comparison": key, "tried": tried}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"search\.json, which this comparison did not write"):
        compare(TUNED, model=shapes, progress=silent, run_dir=tmp_path)


@pytest.mark.parametrize("content", ["[", "[1]", "{}", '{"comparison": "0", "tried": {}}', '{"tried": NaN}'])
def test_a_search_of_another_comparison_is_rejected(content: str, shapes: Model, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"search\.json, which this comparison did not write"):
        compare(TUNED, model=shapes, progress=silent, run_dir=tmp_path)


def test_a_search_sees_training_prompts_alone_and_resumes_with_the_trial_that_was_stopped(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial is an erasure with another value, evaluated on prompts that it was trained with."""
    seen: list[tuple[float, set[str], set[str]]] = []
    original, stop = compare_search.unlearn, True

    def unlearn(context: Any) -> Any:
        if stop and len(seen) == 2:
            raise Cancelled("stopped")
        prompts = context.plan.prompts
        texts = [p.text for p in (*prompts.concepts[0].eval_forget, *prompts.concepts[0].eval_anchor)]
        seen.append((context.plan.options.uce_erase, set(texts), {p.text for p in prompts.eval_retain}))
        return original(context)

    monkeypatch.setattr(compare_search, "unlearn", unlearn)
    folder = tmp_path / "c"
    with pytest.raises(Cancelled):
        compare(TUNED, model=shapes, progress=silent, run_dir=folder)
    planned = preview_comparison(TUNED, folder, model=shapes)
    assert [job["done"] for job in planned["jobs"]] == [False]
    (search,) = planned["searches"]
    assert (search["name"], search["option"], search["tried"]) == ("uce", "uce_erase", 2)
    assert 0 < search["least"] < search["most"] < planned["most"]  # of one trial to three
    stop = False
    done = compare(TUNED, model=shapes, progress=silent, run_dir=folder, resume=True)
    values = [value for value, *_ in seen]
    assert values[:3] == pytest.approx([1, 1 / 3, 3]) and len(set(values)) == len(values), "none is tried twice"
    assert [value for value, _ in done.record.more["tried"]["uce"]] == values
    best = max(done.record.more["tried"]["uce"], key=lambda trial: trial[1])[0]
    used = json.loads((job(folder) / "run.json").read_bytes())["options"]
    assert used["uce_erase"] == done.record.more["searched"]["uce"]["uce_erase"] == best
    prompts = make_plan(shapes.settings, shapes.name, "circle", TUNED.options).prompts
    of = prompts.concepts[0]
    trained = {p.text for p in (*of.forget, *of.anchor)}
    assert all(texts == trained and others == {p.text for p in prompts.retain} for _, texts, others in seen)
    tested = {p.text for p in (*of.eval_forget, *of.eval_anchor, *prompts.eval_retain)}
    assert not tested & (seen[0][1] | seen[0][2])
    key = comparison_record(shapes, TUNED, folder).fingerprint
    assert stored_searches(shapes, TUNED, folder, key)[0].best == best
    assert erasure_of(shapes, TUNED, jobs_of(TUNED)[0], {"uce_erase": best}, folder).done


def test_a_value_out_of_range_scores_nothing(shapes: Model, tmp_path: Path) -> None:
    options = CompareOptions(**{**UCE, "methods": ["speed"], "budget": "tuned", "speed_threshold": 0.9})
    done = compare(options, model=shapes, progress=silent, run_dir=tmp_path)
    assert [score for value, score in done.record.more["tried"]["speed"] if value > 1] == [0.0]


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
    edit(tmp_path / "c" / "run.json", status="failed")
    with open(tmp_path / "c" / "jobs" / "circle-uce-0.salun.safetensors", "ab") as file:
        file.write(b"0")
    with pytest.raises(ConfigError, match="it is not the delta that its run"):
        compare(options, model=shapes, progress=silent, run_dir=tmp_path / "c", resume=True)
