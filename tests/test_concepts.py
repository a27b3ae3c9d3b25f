"""Several concepts in one run: their prompts do not contradict each other, and each is masked, trained and judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import salun
from salun.diffusion.model.loading import describe
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept, mentions, prompts_of
from salun.errors import ConfigError

from .conftest import SHORT

SETTINGS = describe("shapes").settings


def plan(*names: str, **options: Any) -> Any:
    return make_plan(SETTINGS, "shapes", list(names), EraseOptions(**options))


def test_prompts_to_keep_name_none_of_the_concepts() -> None:
    prompts = plan("circle", "red").prompts
    for prompt in prompts.retain + prompts.eval_retain:
        assert not {"circle", "red"} & set(prompt.labels.values())


def test_a_prompt_with_two_concepts_becomes_one_with_both_anchors() -> None:
    circle, red = plan("circle", "red", anchor=["square", "blue"]).prompts.concepts
    for own in (circle, red):
        both = [i for i, p in enumerate(own.forget) if {"circle", "red"} <= set(p.labels.values())]
        assert both
        for i in both:
            assert own.anchor[i].text == own.forget[i].text.replace("circle", "square").replace("red", "blue")
            assert {"square", "blue"} <= set(own.anchor[i].labels.values())


def test_a_concept_that_becomes_nothing_is_left_out_of_the_others_prompts() -> None:
    circle, red = plan("circle", "red", anchor=["square", ""]).prompts.concepts
    assert not any("red" in p.labels.values() for p in circle.forget + circle.eval_forget)
    assert {p.text for p in red.anchor} == {""}
    assert all(p.labels["shape"] != "circle" for p in red.eval_anchor)  # what is kept of a red circle is a square


def test_an_anchor_that_is_erased_too_is_replaced_and_reported() -> None:
    found = plan("circle", "square")  # circle's preset anchor is the square
    assert [c.anchor for c in found.concepts] == ["cross", "cross"] or "square" not in {
        c.anchor for c in found.concepts
    }
    assert any("is to be erased as well" in note for note in found.notes)
    around = plan("circle", "square", anchor=["square", "circle"])
    assert not {c.anchor for c in around.concepts} & {"circle", "square"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["circle", "circle"], {}, "given twice"),
        (["circle", "red"], {"anchor": ["square"]}, "2 concepts, but 1 anchors"),
        ([], {}, "no concept"),
        (["plain", "sketch", "night", "striped", "dotted"], {}, "to be erased as well"),
    ],
)
def test_contradicting_concepts_are_rejected(names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*names, **options)


def test_free_text_concepts_are_not_among_the_retain_prompts() -> None:
    own = Concept(
        "church", anchor="a house", synonyms=("church",), anchors=("a house",), retain=("two churches", "a car")
    )
    prompts = prompts_of([own, Concept("dog", anchor="cat", synonyms=("dog",), anchors=("cat",))], None)
    kept = {p.text for p in prompts.retain + prompts.eval_retain}
    assert "a car" in kept
    assert not [text for text in kept if mentions(text, "church") or mentions(text, "dog")]


def test_given_retain_prompts_that_mention_a_concept_are_left_out_and_reported() -> None:
    found = plan("circle", retain_prompts=["a blue circle", "a car", "two circles"])
    kept = {p.text for p in found.prompts.retain}
    assert "a car" in kept and not [text for text in kept if mentions(text, "circle")]
    (note,) = [note for note in found.notes if "left out" in note]
    assert "'a blue circle', 'two circles'" in note


def test_words_are_found_as_words() -> None:
    assert mentions("two Churches at night", "church")
    assert not mentions("a doghouse", "dog")
    assert mentions("a (dog), sitting", "dog")


@pytest.mark.parametrize("combine", ["joint", "union"])
def test_two_concepts_in_one_run(combine: str, shapes: Model, tmp_path: Path) -> None:
    run = salun.erase(shapes, ["circle", "night"], run_dir=tmp_path / "run", combine=combine, density=0.1, **SHORT)
    assert set(run.metrics["per_concept"]) == {"circle", "night"}
    assert run.metrics["ua"]["n"] == 2 * SHORT["eval_images"]
    assert [run.metrics["per_concept"][c]["ua"]["n"] for c in ("circle", "night")] == [SHORT["eval_images"]] * 2
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Forgetting “circle”, “night”" in text
    assert "After the erasure, by concept" in text
    assert run.history[-1]["step"] == SHORT["steps"]
    if combine == "joint":
        assert run.mask.density == pytest.approx(0.1, abs=1e-6)
    else:
        each = [
            salun.erase(shapes, c, density=0.1, **{**SHORT, "steps": 1, "eval_images": 0}).mask
            for c in ("circle", "night")
        ]
        assert 0.1 < run.mask.density < 0.2
        assert run.mask.jaccard(each[0] | each[1]) > 0.5  # other samples of the same prompts


def test_more_concepts_take_more_steps_by_default() -> None:
    assert plan("circle", "red", "night").recipe.steps == 3 * plan("circle").recipe.steps
    assert plan("circle", "red", steps=7).recipe.steps == 7


@pytest.mark.parametrize(
    "wanted",
    ["nudity", "golden retriever", ["nudity", "van gogh"], Concept("church", anchor="a barn"), ["circle", "tench"]],
    ids=str,
)
@pytest.mark.parametrize("style", ["natural", "tags"])
def test_what_a_run_notes_repeats_its_prompts(wanted: Any, style: str) -> None:
    """`run.json` holds names and options: with them the same prompts come again, or a run could not be resumed."""
    bare = dataclasses.replace(SETTINGS, vocabulary=None)
    first = make_plan(bare, "a model", wanted, EraseOptions(prompt_style=style))
    again = make_plan(bare, "a model", [c.name for c in first.concepts], first.options)
    assert again.prompts.digest == first.prompts.digest
    assert again.options == first.options
