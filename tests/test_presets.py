"""The preset library: what it must hold, and that training prompts and evaluation prompts never meet."""

from __future__ import annotations

import pytest
import yaml

from salun.diffusion.model.loading import describe
from salun.diffusion.prompts.concepts import Concept, library, presets, prompts_of, resolve
from salun.diffusion.prompts.sets import TEXTS
from salun.errors import ConfigError

IMAGENETTE = [
    "tench",
    "english springer",
    "cassette player",
    "chain saw",
    "church",
    "french horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
]


@pytest.mark.parametrize("name", ["nudity", "violence", "van gogh", *IMAGENETTE])
def test_the_named_presets_are_there(name: str) -> None:
    assert name in presets()


def test_what_platforms_must_hide_is_marked_sensitive() -> None:
    assert {name for name, entry in presets().items() if entry.get("sensitive")} == {"nudity", "violence"}


def test_every_preset_pairs_each_synonym_with_an_anchor() -> None:
    for name, entry in presets().items():
        assert len(entry["synonyms"]) == len(entry["anchors"]) >= 3, name
        assert entry["kind"] in library()["kinds"], name
        assert len(entry["retain"]) >= 10, name


def test_presets_have_names_in_the_languages_that_evaluations_use() -> None:
    sentences = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))["languages"]
    assert set(sentences) == set(library()["kinds"]) and all(len(of) == 12 for of in sentences.values())
    for name, entry in presets().items():
        assert set(entry.get("names", {})) <= set(sentences["object"]), name


def test_aliases_name_one_preset_each() -> None:
    names = [*presets(), *(alias for entry in presets().values() for alias in entry.get("aliases", []))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [*presets(), "golden retriever"])
def test_training_and_evaluation_prompts_are_disjoint(name: str) -> None:
    concept, _ = resolve(Concept(name), None, "a model")
    prompts = prompts_of([concept], None)
    (own,) = prompts.concepts
    taught = {p.text for p in own.forget + own.anchor + prompts.retain}
    asked = {p.text for p in own.eval_forget + prompts.eval_retain}
    assert asked.isdisjoint(taught - {""})
    assert not {p.text for p in prompts.retain} & {p.text for p in own.forget}
    assert len(prompts.eval_retain) >= 40


@pytest.mark.parametrize("name", ["circle", "red", "night"])
def test_they_are_disjoint_on_a_model_with_a_vocabulary_too(name: str) -> None:
    vocabulary = describe("shapes").settings.vocabulary
    concept, _ = resolve(Concept(name), vocabulary, "shapes")
    prompts = prompts_of([concept], vocabulary)
    (own,) = prompts.concepts
    taught = {p.text for p in own.forget + own.anchor + prompts.retain}
    assert {p.text for p in own.eval_forget + prompts.eval_retain}.isdisjoint(taught)
    assert all(name in p.labels.values() for p in own.forget + own.eval_forget)
    assert not any(name in p.labels.values() for p in prompts.retain + prompts.eval_retain)


def test_an_alias_finds_its_preset() -> None:
    concept, notes = resolve(Concept("NSFW"), None, "a model")
    assert concept.preset == "nudity"
    assert concept.sensitive
    assert not notes


def test_free_text_works_with_and_without_an_anchor() -> None:
    concept, notes = resolve(Concept("golden retriever", anchor="cat"), None, "a model")
    (own,) = prompts_of([concept], None).concepts
    assert "a photo of golden retriever" in {p.text for p in own.forget}
    assert "a photo of cat" in {p.text for p in own.anchor}
    assert not notes
    concept, notes = resolve(Concept("golden retriever"), None, "a model")
    assert {p.text for p in prompts_of([concept], None).concepts[0].anchor} == {""}
    assert notes == ["no anchor for 'golden retriever': it becomes what the empty prompt shows"]


def test_a_near_miss_of_a_preset_is_reported() -> None:
    _, notes = resolve(Concept("nudty", anchor="a person"), None, "a model")
    assert "nudity" in notes[0]


def test_concepts_outside_the_vocabulary_are_rejected() -> None:
    vocabulary = describe("shapes").settings.vocabulary
    with pytest.raises(ConfigError, match=r"'dragon' is not in the vocabulary.*circle"):
        resolve(Concept("dragon"), vocabulary, "shapes")
    with pytest.raises(ConfigError, match="anchor is 'red', but must be a shape"):
        resolve(Concept("circle", anchor="red"), vocabulary, "shapes")


@pytest.mark.parametrize("name", ["", "   "])
def test_an_empty_concept_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="concept is empty"):
        Concept(name)
