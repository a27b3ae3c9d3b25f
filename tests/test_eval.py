"""`salun eval`: a run or any model beside its original, on prompts of all kinds, with several detectors."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import salun
from cli.output import flag
from salun.delta.delta import Delta
from salun.diffusion import eval_sets
from salun.diffusion.data import latents as latents_module
from salun.diffusion.eval_options import SETS as SET_NAMES
from salun.diffusion.eval_options import EvalOptions, option_name
from salun.diffusion.eval_output import check_output_folder, set_rows, write_evaluation
from salun.diffusion.eval_sets import rate_json, sampled_set
from salun.diffusion.evaluate import evaluate
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.prompts.concepts import Concept, prompts_of, resolve
from salun.diffusion.prompts.prompt_file import PromptRow
from salun.diffusion.prompts.sets import SETS, PromptSet, prompt_sets
from salun.errors import ConfigError, DataError
from salun.evaluation.calibration import Calibration
from salun.evaluation.detectors.attribute import AttributeClassifier
from salun.evaluation.estimate import Estimate
from salun.files import sha256_file
from salun.progress import Event, Stage, silent

from .conftest import run_command

I2P = "case_number,prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
ROWS = '41,"drawing of one red circle, plain style",7,3,64,64\n42,"one blue star, night style",8,2.5,,96\n'


@pytest.fixture(scope="module")
def erased(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run`, its model as a single file, and prompts in `i2p.csv`."""
    folder = tmp_path_factory.mktemp("eval")
    few = {"eval_images": 4, "steps": 4, "batch_size": 4, "forget_latents": 8, "retain_latents": 8}
    few["sampling_steps"] = 6
    run = salun.erase(shapes, "circle", run_dir=folder / "run", progress=silent, **few)
    run.save(folder / "single.safetensors")
    (folder / "i2p.csv").write_text(I2P + ROWS, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_eval_judges_a_run_with_several_detectors_and_a_prompt_file(
    erased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(erased / "cache"))
    options = ("--detector", "attribute", "--detector", "self", "--prompts", "i2p.csv", "--keep-images", "-n", "8")
    done = run_command("eval", "run", *options, cwd=erased)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "attribute:" and lines[1].split(":")[0] in ("Erased", "Mostly erased", "Barely changed")
    assert "self:" in lines and lines[-1] == f"report: {erased / 'run' / 'eval.html'}"
    data = json.loads((erased / "run" / "eval.json").read_text(encoding="utf-8"))
    assert (
        set(data["detectors"]) == {"attribute", "self"} and data["verdict"] == data["detectors"]["attribute"]["verdict"]
    )
    rate = data["sets"]["i2p.csv"]["detected"]["self"]["circle"]
    assert data["ua"]["n"] == 8 and rate["before"]["value"] == rate["corrected"]["before"]["value"] == 50
    assert any(line.startswith("i2p.csv · 2 · self · circle (corrected) · 50.0 %") for line in lines)
    rows = list(csv.DictReader((erased / "run" / "eval.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 8 * 5 + 2 * 2
    mine = [row for row in rows if row["set"] == "i2p.csv"]
    joined = [tuple(row[key] for key in ("id", "row", "seed", "guidance", "width", "height")) for row in mine]
    assert joined == [("41", "2", "7", "3", "64", "64"), ("42", "3", "8", "2.5", "64", "96")] * 2
    assert all(row["self circle: circle"] for row in mine)
    for name, rate in data["sets"]["i2p.csv"]["detected"].items():
        for side in ("before", "after"):
            hits = [int(row[f"{name} detects: circle"]) for row in mine if row["model"] == side]
            assert 100 * np.mean(hits) == rate["circle"][side]["value"]
    made = rows[0]
    assert (made["set"], made["id"], made["row"], made["guidance"], made["width"]) == ("concept", "", "", "3", "64")
    assert len(list((erased / "run" / "images" / "i2p.csv").glob("*.png"))) == 4
    page = (erased / "run" / "eval.html").read_text(encoding="utf-8")
    assert "By the detector self" in page and "Sets of prompts" in page and "http" not in page.split("</style>")[1]
    line = "salun eval run --detector attribute --detector self --prompts i2p.csv --keep-images -n 8"
    assert data["command"] == line and line in page and "UA (unlearning accuracy)" in page
    assert all(f'href="{name}"' in page for name in ("eval.json", "eval.csv", "images/"))


def test_rates_of_sets_are_corrected_or_unknown_or_called_raw() -> None:
    def shown(fraction: float) -> np.ndarray:
        return np.arange(100) < 100 * fraction

    hits = {"before": shown(0.9), "after": shown(0.2)}
    sound = rate_json(hits, Calibration(shown(0.9), shown(0.1), 0.95))
    blind = rate_json(hits, Calibration(shown(0.3), shown(0.1), 0.6))
    alone = rate_json({"after": hits["after"]}, None)
    assert sound["calibrated"] and sound["reason"] is None and sound["after"]["value"] == 20
    after = Estimate(**sound["corrected"]["after"])
    assert after.value == pytest.approx(100 * (0.2 - 0.1) / (0.9 - 0.1)) and after.n == 100
    assert after.low is not None and after.high is not None and 0 <= after.low < after.value < after.high < 30
    assert blind["before"] is blind["after"] is blind["corrected"]["after"] is None and "AUC 0.60" in blind["reason"]
    assert not alone["calibrated"] and alone["corrected"] is alone["reason"] is None
    detected = {"nudenet": {"sound": sound, "blind": blind, "alone": alone}}
    rows = set_rows({"i2p": {"n": 100, "detected": detected, "preserve": False, "image_drift": None}})
    assert [row[:4] for row in rows] == [
        ("i2p", "100", "nudenet", what)
        for what in ("sound (corrected)", "sound (raw)", "blind", "alone (raw, not calibrated)")
    ]
    assert rows[0][5].startswith("12.5 %") and rows[1][5].startswith("20.0 %") and rows[3][4] == ""
    assert rows[2][4:] == ("unknown", blind["reason"])


@pytest.mark.slow
def test_eval_result_says_what_was_evaluated_and_how(erased: Path, shapes: Model) -> None:
    prompts = erased / "few.csv"
    prompts.write_text('prompt\none red circle\n""\none blue star\none red ring\n', encoding="utf-8")
    options = EvalOptions(n=2, sampling_steps=3, prompts=[str(prompts)], max_prompts=2, detector=["attribute"])
    data = evaluate(str(erased / "run"), options, command="salun eval run").as_json()
    delta = Delta.load(erased / "run" / "delta.salun.safetensors")
    assert data["models"] == {
        "model": {"name": "run", "weights": delta.result_hash, "parts": shapes.parts_hash},
        "original": {"name": "shapes", "weights": shapes.base_hash, "parts": shapes.parts_hash},
    }
    assert data["sampling"] == {
        **{"steps": 3, "guidance": 3.0, "resolution": 64, "negative_prompt": "", "sampler": None},
        "scheduler": "DPMSolverMultistepScheduler",
    }
    (listed,) = data["inputs"]
    assert listed["path"] == "few.csv" and listed["sha256"] == sha256_file(prompts)
    assert data["sets"]["few.csv"]["n"] == 2
    assert data["notes"] == [
        "few.csv: skipped rows with an empty prompt: 1", "few.csv: the first 2 of 3 prompts (max_prompts)",
    ]  # fmt: skip
    used = data["options"]
    assert data["concepts"] == [{"name": "circle", "anchor": "square"}]
    assert used["concept"] == ["circle"] and used["detector"] == ["attribute"]
    assert used["sampling_steps"] == 3 and used["resolution"] == 64 and used["dtype"] == "fp32" and used["n"] == 2
    assert data["command"] == "salun eval run" and data["versions"]["salun"]


@pytest.mark.slow
def test_eval_holds_few_images_at_once(
    shapes: Model, erased: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "batch_size_of", lambda _: 2)
    monkeypatch.setattr(AttributeClassifier.detect_images, "__defaults__", (4,))
    sizes: list[int] = []
    alive: list[int] = []
    decode = Model.decode

    def counted(model: Model, part: Any) -> Any:
        batch = decode(model, part).copy()
        sizes.append(len(batch))
        alive.append(len(batch))
        weakref.finalize(batch, alive.append, -len(batch))
        assert sum(alive) <= 5 * 2 + 2  # a batch of each of five sets, and the next one, however many images they have
        return batch

    monkeypatch.setattr(Model, "decode", counted)
    options = EvalOptions(n=6, sampling_steps=1, detector=["attribute"], keep_images=True, sets=[])
    result = evaluate(str(erased / "run"), options)
    write_evaluation(result, tmp_path)
    assert len(list((tmp_path / "images").rglob("*.png"))) == 6 * 5 and max(sizes) == 2


def test_a_long_list_of_prompts_is_encoded_in_parts(shapes: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PromptRow(f"one red {shape}") for shape in ("circle", "square", "ring", "star", "circle")]
    encoded: list[int] = []
    encode, steps = shapes.encode, list[Event]()
    with shapes.configured(EraseOptions(sampling_steps=4)):  # a single step magnifies rounding twenty times as much
        whole = sampled_set(shapes, PromptSet("list", rows), [*range(5)])
        monkeypatch.setattr(eval_sets, "ENCODED", 2)
        monkeypatch.setattr(shapes, "encode", lambda prompts: encoded.append(len(prompts)) or encode(prompts))
        parts = sampled_set(shapes, PromptSet("list", rows), [*range(5)], steps.append)
    assert torch.allclose(parts.parts[0].latents, whole.parts[0].latents, atol=1e-4)
    assert max(encoded) == 2 + 1 and [event.step for event in steps if event.step][-1] == 5
    assert {event.total for event in steps} == {5}


@pytest.mark.slow
def test_eval_uses_the_detector_of_the_run(erased: Path) -> None:
    run = Path(shutil.copytree(erased / "run", erased / "by self"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["options"]["detector"] = "self"
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    options = EvalOptions(n=2, sampling_steps=1)
    result = evaluate(str(run), options)
    assert list(result.metrics) == ["self"] and result.notes == ["the detector is self, as in the run"]
    result = evaluate(str(run), dataclasses.replace(options, detector=["attribute"]))
    assert list(result.metrics) == ["attribute"] and not result.notes


@pytest.mark.slow
def test_eval_of_a_run_takes_the_options_that_are_given(erased: Path) -> None:
    result = evaluate(str(erased / "run"), EvalOptions(n=2, sampling_steps=3))
    assert result.plan.sampling.steps == 3 and result.plan.options.density == 0.5
    with pytest.raises(ConfigError, match="anchor is named by the run folder already"):
        evaluate(str(erased / "run"), EvalOptions(n=2, anchor=["star"]))


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("my model.safetensors", "Name the model that it wrote instead: 'my model.safetensors' --against shapes "
         "--concept circle"),
        ("lora.lora.safetensors", "run the erasure again without --output"),
    ],
)  # fmt: skip
def test_eval_of_a_run_without_a_delta_names_the_model_that_it_wrote(
    output: str, advice: str, erased: Path, tmp_path: Path
) -> None:
    record = json.loads((erased / "run" / "run.json").read_text(encoding="utf-8"))
    record["options"] |= {"output": [output], "model": "shapes"}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    done = run_command("eval", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1 and "holds no delta" in done.stderr and advice in done.stderr


@pytest.mark.slow
def test_sets_of_prompts_are_sampled_from_a_model_of_free_text(copy_of_shapes: Path) -> None:
    settings = {"sampling": {"resolution": 64, "steps": 2, "guidance": 3.0}}
    (copy_of_shapes / "salun.yaml").write_text(json.dumps(settings), encoding="utf-8")
    model = str(copy_of_shapes)
    options = EvalOptions(
        against=model, concept=["church"], n=4, sets=["compositions", "neighbors"], synonyms=["a minster"]
    )
    found = evaluate(model, options).as_json()["sets"]
    assert list(found) == ["concept", "other prompts", "compositions", "neighbors", "synonyms"]
    assert [each["n"] for each in found.values()][:4] == [4, 4, 6, 16]  # -n is of the held-out sets alone
    assert all(each["image_drift"]["value"] == 0 for each in found.values())
    assert set(found["neighbors"]["detected"]["self"]) == {"church", "as prompted"}


@pytest.mark.slow
def test_eval_compares_any_model_with_its_original_and_continues_from_the_cache(
    erased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(erased / "cache"))
    options = EvalOptions(against="shapes", concept=["circle"], n=8, seed=5, sampling_steps=6)

    def sampled(target: str) -> tuple[dict[str, Any], int]:
        steps: list[Event] = []
        data = evaluate(target, options, steps.append).as_json()
        return data, sum(event.stage is Stage.IMAGES_AFTER and event.step < event.total for event in steps)

    first, steps = sampled(str(erased / "run" / "model"))
    assert first["ua"]["n"] == 8 and steps > 0
    again, steps = sampled(str(erased / "run" / "model"))
    assert again == first and steps == 0
    single = str(erased / "single.safetensors")  # the same model in another layout
    as_file = evaluate(single, dataclasses.replace(options, components="shapes")).as_json()
    assert as_file["verdict"]["outcome"] == first["verdict"]["outcome"]
    untouched, _ = sampled("shapes")
    assert untouched["verdict"]["outcome"] == "barely changed" and untouched["image_drift"]["value"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "shapes is not a run folder, so a concept is needed"),
        ({"against": "shapes", "concept": ["circle"], "sets": ["languages"]}, "the words of its vocabulary only"),
        ({"against": "shapes", "concept": ["circle"], "detector": ["nudenet"]}, "nudenet"),
        ({"against": "shapes", "concept": ["circle"], "prompts": ["gone.csv"]}, "gone.csv cannot be read"),
        ({"concept": ["circle"], "synonyms": ["disk"]}, "synonyms are prompts in free text"),
        ({"concept": ["circle"], "prompts": ["a/i2p.csv", "b/I2P.csv"]}, "name the sets 'i2p.csv' and 'I2P.csv'"),
        ({"concept": ["circle"], "prompts": ["long.txt"]}, "tokens; the limit is"),
    ],
    ids=str,
)
def test_eval_says_what_is_missing_before_it_samples(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/i2p.csv", "b/I2P.csv"):
        Path(name).parent.mkdir()
        Path(name).write_text("prompt\none red circle\n", encoding="utf-8")
    Path("long.txt").write_text("red " * 400, encoding="utf-8")
    events: list[Event] = []
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate("shapes", EvalOptions(n=2, **changes), events.append)
    assert not events


def test_eval_checks_its_output_before_it_samples(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output in ("file", "file/below"):
        done = run_command("eval", "shapes", "--concept", "circle", "--output", output, cwd=tmp_path)
        assert done.returncode == 2 and "not a folder" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "used" / "eval.csv").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"in which eval\.csv is a folder\. Name another"):
        check_output_folder(tmp_path / "used", EvalOptions())


def test_eval_advice_names_options_of_eval() -> None:
    assert flag(option_name("eval_images")) == "-n" and flag(option_name("retain_weight")) == "--retain-weight"


def test_sets_of_prompts_are_disjoint_from_training_and_say_what_they_should() -> None:
    concept, _ = resolve(Concept("a golden retriever", "a cat"), None, "sd15")
    prompts = prompts_of([concept], None)
    given = {"synonyms": ["a yellow labrador"], "neighbors": ["a wolf"]}
    made = {each.name: each for each in prompt_sets(SET_NAMES, [concept], prompts, given)}
    assert tuple(made) == SET_NAMES == tuple(SETS)
    trained = {
        p.text for part in (prompts.concepts[0].forget, prompts.concepts[0].anchor, prompts.retain) for p in part
    }
    for each in made.values():
        assert each.rows and not trained & {row.text for row in each.rows}
        assert each.preserve == (each.name == "neighbors") and (each.shows is None) == each.preserve
    assert all("a yellow labrador" in row.text for row in made["synonyms"].rows)
    assert all("a golden retriever" in row.text for row in (*made["languages"].rows, *made["compositions"].rows))
    assert all("a wolf" in row.text for row in made["neighbors"].rows)
    with pytest.raises(ConfigError, match="sets is nowhere, but must be of synonyms"):
        prompt_sets(["nowhere"], [concept], prompts)
    with pytest.raises(ConfigError, match="synonyms has no prompts for"):
        prompt_sets(["synonyms"], [concept], prompts)


def set_texts(name: str, *concepts: str) -> list[str]:
    """The prompts of a set for each of the concepts."""
    resolved = [resolve(Concept(concept), None, "sd15")[0] for concept in concepts]
    made = prompt_sets([name], resolved, prompts_of(resolved, None), similar=lambda _, nouns: list(nouns))
    return [row.text for each in made for row in each.rows]


def test_neighbors_are_objects_near_an_object_and_other_styles_near_a_style() -> None:
    assert "an image showing dog" in set_texts("neighbors", "french horn")
    assert "a painting of a bridge, in the style of Claude Monet" in set_texts("neighbors", "van gogh")
    both = set_texts("neighbors", "van gogh", "monet")  # what is erased too is not what must stay
    assert both and not any("Monet" in text or "Gogh" in text for text in both)
    for concept, kind in (("nudity", "of the kind content"), ("Greg Rutkowski", "free text of no known kind")):
        with pytest.raises(ConfigError, match=f"none are known of '{concept}', which is {kind}. Give .* by neighbors"):
            set_texts("neighbors", concept)


def test_languages_use_the_names_of_presets_and_free_text_as_it_is_given() -> None:
    assert {"ein Foto von einer Kirche", "教堂的照片", "на фотографии церковь"} <= set(set_texts("languages", "church"))
    assert {"obraz w stylu Vincenta van Gogha", "картина в стиле Винсента Ван Гога"} <= set(
        set_texts("languages", "van gogh")
    )
    assert "une photo montrant golden retriever" in set_texts("languages", "golden retriever")
