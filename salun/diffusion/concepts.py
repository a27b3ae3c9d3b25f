"""A concept: what to forget, what it becomes, what to keep, and how to ask whether it worked.

Words become prompts here and nowhere else. Training prompts and evaluation prompts are disjoint.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salun.diffusion.vocabulary import Prompt, Vocabulary
from salun.errors import ConfigError

LIBRARY = Path(__file__).resolve().parents[1] / "assets" / "concepts.yaml"


@dataclass(frozen=True)
class Concept:
    """Something to forget.

    name: a preset's name, a value of the model's vocabulary, or any text. anchor: what it becomes; "" is the empty
    prompt, None the preset's anchor (the empty prompt where there is no preset). retain: prompts to keep, added to the
    default ones. synonyms and anchors: pairs of phrases that go into the kind's templates. kind: object, style, person
    or content. sensitive: pictures are blurred until asked for.
    """

    name: str
    anchor: str | None = None
    retain: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    kind: str = "object"
    sensitive: bool = False
    preset: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("the concept is empty: name what the model should forget, e.g. --concept circle")
        if self.anchor is not None and self.anchor.strip() == self.name.strip():
            raise ConfigError(f"concept and anchor are both {self.name!r}: an anchor is what the concept becomes")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one erasure. anchor[i] belongs to forget[i], eval_anchor[i] to eval_forget[i].

    attribute, value, anchor_value: where the concept stands in the model's vocabulary, or None.
    """

    forget: list[Prompt]
    anchor: list[str]
    retain: list[Prompt]
    eval_forget: list[Prompt]
    eval_anchor: list[str]
    eval_retain: list[Prompt]
    attribute: str | None = None
    value: str | None = None
    anchor_value: str | None = None


@cache
def library() -> dict[str, Any]:
    """The preset library: kinds with templates, retain prompts, presets."""
    data: dict[str, Any] = yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))
    return data


def presets() -> dict[str, dict[str, Any]]:
    """Preset name → its entry."""
    found: dict[str, dict[str, Any]] = library()["presets"]
    return found


def resolve(concept: Concept, vocabulary: Vocabulary | None, model: str) -> tuple[Concept, list[str]]:
    """The concept with everything filled in, and lines to tell the user.

    A model with a vocabulary knows only its words: another raises ConfigError that lists them. Elsewhere a preset's
    name (or alias) takes the preset, and any other text is taken as it is.
    """
    if vocabulary is not None:
        attribute = vocabulary.require(concept.name, model)
        anchor = concept.anchor if concept.anchor is not None else vocabulary.anchors.get(concept.name, "")
        if anchor and vocabulary.require(anchor, model) != attribute:
            raise ConfigError(
                f"the anchor {anchor!r} is no {attribute} as {concept.name!r} is: "
                f"choose one of {', '.join(v for v in vocabulary.attributes[attribute] if v != concept.name)}"
            )
        return replace(concept, anchor=anchor), _told(concept.name, anchor)
    key = concept.name.strip().lower()
    named = {key: key for key in presets()}
    for name, entry in presets().items():
        named.update({alias.lower(): name for alias in entry.get("aliases", [])})
    if key not in named:
        near = difflib.get_close_matches(key, named, 1, 0.8)
        notes = [f"{concept.name!r} is no preset (is it {near[0]!r}?): taken as free text"] if near else []
        anchor = concept.anchor or ""
        filled = replace(
            concept, anchor=anchor, synonyms=concept.synonyms or (concept.name,), anchors=concept.anchors or (anchor,)
        )
        if len(filled.anchors) == 1:
            filled = replace(filled, anchors=filled.anchors * len(filled.synonyms))
        return filled, [*notes, *_told(concept.name, anchor)]
    entry = presets()[named[key]]
    if concept.anchor is None:
        anchors = tuple(entry["anchors"])
        anchor = anchors[0]
    else:
        anchor, anchors = concept.anchor, (concept.anchor,) * len(entry["synonyms"])
    filled = Concept(
        name=concept.name,
        anchor=anchor,
        retain=(*entry["retain"], *concept.retain),
        synonyms=tuple(entry["synonyms"]),
        anchors=anchors,
        kind=entry["kind"],
        sensitive=bool(entry.get("sensitive", False)),
        preset=named[key],
    )
    return filled, _told(concept.name, anchor)


def prompts_of(concept: Concept, vocabulary: Vocabulary | None) -> Prompts:
    """All prompts of a resolved concept."""
    return _from_vocabulary(concept, vocabulary) if vocabulary is not None else _from_templates(concept)


def _told(name: str, anchor: str) -> list[str]:
    return [] if anchor else [f"no anchor for {name!r}: it becomes what the empty prompt gives"]


def _from_vocabulary(concept: Concept, vocabulary: Vocabulary) -> Prompts:
    attribute = vocabulary.attribute_of(concept.name)
    assert attribute is not None
    others = [value for value in vocabulary.attributes[attribute] if value != concept.name]

    def pairs(templates: list[str]) -> tuple[list[Prompt], list[str]]:
        forget = list(vocabulary.prompts(templates, **{attribute: [concept.name]}))
        if not concept.anchor:
            return forget, [""] * len(forget)
        return forget, [p.text for p in vocabulary.prompts(templates, **{attribute: [concept.anchor]})]

    forget, anchor = pairs(vocabulary.train)
    eval_forget, eval_anchor = pairs(vocabulary.eval)
    retain = list(vocabulary.prompts(vocabulary.train, **{attribute: others}))
    return Prompts(
        forget,
        anchor,
        [*retain, *(Prompt(text, {}) for text in concept.retain)],
        eval_forget,
        eval_anchor,
        list(vocabulary.prompts(vocabulary.eval, **{attribute: others})),
        attribute,
        concept.name,
        concept.anchor or None,
    )


def _from_templates(concept: Concept) -> Prompts:
    templates = library()["kinds"][concept.kind]

    def fill(which: str) -> tuple[list[Prompt], list[str]]:
        forget, anchor = [], []
        for synonym, other in zip(concept.synonyms, concept.anchors, strict=True):
            for template in templates[which]:
                forget.append(Prompt(template.replace("{}", synonym), {}))
                anchor.append(template.replace("{}", other) if other else "")
        return forget, anchor

    forget, anchor = fill("train")
    eval_forget, eval_anchor = fill("eval")
    retain = dict.fromkeys([*concept.retain, *library()["retain"]])
    taught = {p.text for p in forget} | set(anchor)
    judged = [text for text in library()["retain_eval"] if text not in retain and text not in taught]
    return Prompts(
        forget,
        anchor,
        [Prompt(text, {}) for text in retain],
        eval_forget,
        eval_anchor,
        [Prompt(text, {}) for text in judged],
    )
