"""`salun eval`: a run or any model beside its original, on prompts of all kinds, with several detectors."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import salun
from salun.diffusion.eval_options import SETS as SET_NAMES
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluate import evaluate
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.prompts.concepts import Concept, mentions, prompts_of, resolve
from salun.diffusion.prompts.sets import SETS, prompt_sets
from salun.errors import ConfigError, DataError
from salun.progress import Event, Stage, silent

I2P = "prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
ROWS = '"drawing of one red circle, plain style",7,3,64,64\n"one blue star, night style",8,2,64,64\n'


@pytest.fixture(scope="module")
def erased(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run`, its model as a single file, and prompts in `i2p.csv`."""
    folder = tmp_path_factory.mktemp("eval")
    few = {"eval_images": 4, "steps": 4, "batch_size": 4, "forget_latents": 8, "retain_latents": 8}
    run = salun.erase(shapes, "circle", run_dir=folder / "run", progress=silent, **few)
    run.save(folder / "single.safetensors")
    (folder / "i2p.csv").write_text(I2P + ROWS, encoding="utf-8")
    return folder


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "SALUN_CACHE": str(cwd / "cache")}
    program = [sys.executable, "-m", "salun", *arguments]
    return subprocess.run(program, cwd=cwd, env=settings, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
def test_eval_judges_a_run_with_several_detectors_and_a_prompt_file(erased: Path) -> None:
    options = ("--detector", "attribute", "--detector", "self", "--prompts", "i2p.csv", "--keep-images", "-n", "8")
    done = command("eval", "run", *options, cwd=erased)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "attribute:" and lines[1].split(":")[0] in ("Erased", "Mostly erased", "Barely changed")
    assert "self:" in lines and lines[-1] == "report: run/eval.html"
    data = json.loads((erased / "run" / "eval.json").read_text(encoding="utf-8"))
    assert (
        set(data["detectors"]) == {"attribute", "self"} and data["verdict"] == data["detectors"]["attribute"]["verdict"]
    )
    assert data["ua"]["n"] == 8 and data["sets"]["i2p.csv"]["detected"]["self"]["circle"]["before"]["value"] == 50
    rows = list(csv.DictReader((erased / "run" / "eval.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 8 * 5 + 2 * 2
    mine = [row for row in rows if row["set"] == "i2p.csv"]
    assert [row["seed"] for row in mine] == ["7", "8"] * 2 and all(row["self circle: circle"] for row in mine)
    assert len(list((erased / "run" / "images" / "i2p.csv").glob("*.png"))) == 4
    page = (erased / "run" / "eval.html").read_text(encoding="utf-8")
    assert "By the detector self" in page and "Sets of prompts" in page and "http" not in page.split("</style>")[1]


@pytest.mark.slow
def test_eval_of_a_run_takes_the_options_that_are_given(erased: Path) -> None:
    result = evaluate(str(erased / "run"), EvalOptions(n=2, sampling_steps=3))
    assert result.plan.sampling.steps == 3 and result.plan.options.density == 0.5
    with pytest.raises(ConfigError, match="anchor is named by the run folder already"):
        evaluate(str(erased / "run"), EvalOptions(n=2, anchor=["star"]))


@pytest.mark.slow
def test_sets_of_prompts_are_sampled_from_a_model_of_free_text(copy_of_shapes: Path) -> None:
    settings = {"sampling": {"resolution": 64, "steps": 2, "guidance": 3.0}}
    (copy_of_shapes / "salun.yaml").write_text(json.dumps(settings), encoding="utf-8")
    model = str(copy_of_shapes)
    result = evaluate(model, EvalOptions(against=model, concept=["a golden retriever"], n=4, sets=[*SET_NAMES[1:]]))
    found = result.as_json()["sets"]
    assert list(found) == ["concept", "other prompts", "compositions", "languages", "neighbors"]
    assert all(each["n"] == 4 and each["image_drift"]["value"] == 0 for each in found.values())
    assert set(found["neighbors"]["detected"]["self"]) == {"a golden retriever", "as prompted"}


@pytest.mark.slow
def test_eval_compares_any_model_with_its_original_and_continues_from_the_cache(
    erased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(erased / "cache"))
    options = EvalOptions(against="shapes", concept=["circle"], n=8, seed=5)

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
    ],
    ids=str,
)
def test_eval_says_what_is_missing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate("shapes", EvalOptions(n=2, **changes))


def test_sets_of_prompts_are_disjoint_from_training_and_say_what_they_should() -> None:
    concept, _ = resolve(Concept("a golden retriever", "a cat"), None, "sd15")
    prompts = prompts_of([concept], None)
    made = {
        each.name: each
        for each in prompt_sets(SET_NAMES, [concept], prompts, ["a yellow labrador"], lambda _, nouns: list(nouns))
    }
    assert tuple(made) == SET_NAMES == tuple(SETS)
    trained = {
        p.text for part in (prompts.concepts[0].forget, prompts.concepts[0].anchor, prompts.retain) for p in part
    }
    for each in made.values():
        assert each.rows and not trained & {row.text for row in each.rows}
        assert each.preserve == (each.name == "neighbors") and (each.shows is None) == each.preserve
    assert all("a yellow labrador" in row.text for row in made["synonyms"].rows)
    assert all("a golden retriever" in row.text for row in (*made["languages"].rows, *made["compositions"].rows))
    assert not any(mentions(row.text, word) for row in made["neighbors"].rows for word in ("golden retriever", "cat"))
    with pytest.raises(ConfigError, match="sets is nowhere, but must be of synonyms"):
        prompt_sets(["nowhere"], [concept], prompts)
    with pytest.raises(ConfigError, match="synonyms has no prompts for"):
        prompt_sets(["synonyms"], [concept], prompts)
