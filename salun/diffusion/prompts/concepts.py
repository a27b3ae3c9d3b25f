"""A concept: what to forget, what it becomes, what to keep, and how to ask whether it worked.

Words become prompts here and nowhere else. Training prompts and evaluation prompts are disjoint.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salun.diffusion.prompts.vocabulary import Prompt, Vocabulary
from salun.errors import ConfigError
from salun.user_text import checked, prompt_text

LIBRARY = Path(__file__).resolve().parents[2] / "assets" / "concepts.yaml"


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
        for part in ("name", "anchor", "retain", "synonyms", "anchors"):
            object.__setattr__(self, part, _read(getattr(self, part)))
        if not self.name.strip():
            raise ConfigError("the concept is empty: name what the model should forget, e.g. --concept circle")
        if self.anchor is not None and self.anchor.strip() == self.name.strip():
            raise ConfigError(f"concept and anchor are both {self.name!r}: an anchor is what the concept becomes")


def _read(given: Any) -> Any:
    """A text, a tuple of texts, or None, as prompts are read. Raises ConfigError for what is not Unicode."""
    if isinstance(given, str):
        return prompt_text(checked(given, "a concept or prompt"))
    return given if given is None else tuple(map(_read, given))


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of one concept. anchor[i] belongs to forget[i], eval_anchor[i] to eval_forget[i].

    An anchor's labels are what a picture of the forget prompt should show once the concept is gone. attribute, value,
    anchor_value: where the concept stands in the model's vocabulary, or None.
    """

    forget: list[Prompt]
    anchor: list[Prompt]
    eval_forget: list[Prompt]
    eval_anchor: list[Prompt]
    attribute: str | None = None
    value: str | None = None
    anchor_value: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of one erasure: each concept's own, and those to keep, which name none of the concepts."""

    concepts: list[ConceptPrompts]
    retain: list[Prompt]
    eval_retain: list[Prompt]

    @property
    def digest(self) -> str:
        """A hash of all texts in their order."""
        own = [part for one in self.concepts for part in (one.forget, one.anchor, one.eval_forget, one.eval_anchor)]
        texts = [[prompt.text for prompt in part] for part in (*own, self.retain, self.eval_retain)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@cache
def library() -> dict[str, Any]:
    """The preset library: kinds with templates, retain prompts, presets."""
    data: dict[str, Any] = yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))
    return data


def presets() -> dict[str, dict[str, Any]]:
    """Preset name → its entry."""
    found: dict[str, dict[str, Any]] = library()["presets"]
    return found


def resolve(
    concept: Concept, vocabulary: Vocabulary | None, model: str, style: str = "natural"
) -> tuple[Concept, list[str]]:
    """The concept with everything filled in, and lines to tell the user.

    A model with a vocabulary knows only its words: another raises ConfigError that lists them. Elsewhere a preset's
    name (or alias) takes the preset, and any other text is taken as it is. style "tags": phrases without articles, and
    the preset's own tags where it has some.
    """
    if vocabulary is not None:
        if style != "natural":
            raise ConfigError(f"--prompt-style {style}: {model} has prompts of its own; leave the option out")
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
    synonyms = tuple(entry["synonyms"])
    if style == "tags":
        if concept.anchor is None:
            anchors = tuple(entry.get("tag_anchors") or map(_without_article, anchors))
        synonyms = tuple(entry.get("tags") or map(_without_article, synonyms))
        anchors = anchors if len(anchors) == len(synonyms) else (_without_article(anchor),) * len(synonyms)
    filled = Concept(
        name=concept.name,
        anchor=anchor,
        retain=(*entry["retain"], *concept.retain),
        synonyms=synonyms,
        anchors=anchors,
        kind=entry["kind"],
        sensitive=bool(entry.get("sensitive", False)),
        preset=named[key],
    )
    return filled, _told(concept.name, anchor)


def part(concepts: Sequence[Concept], vocabulary: Vocabulary | None) -> tuple[list[Concept], list[str]]:
    """Resolved concepts that do not stand in each other's way, and lines to tell the user.

    An anchor that is to be forgotten as well is replaced by its own anchor, and so on, or by any value that stays.
    Raises ConfigError for a concept named twice, or where nothing is left to take an anchor from.
    """
    names = [concept.name for concept in concepts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--concept {twice[0]} is given twice: name each concept once")
    goes_to = {concept.name: concept.anchor or "" for concept in concepts}
    parted, notes = [], []
    for concept in concepts:
        anchor, seen = goes_to[concept.name], {concept.name}
        while anchor in goes_to and anchor not in seen:
            seen.add(anchor)
            anchor = goes_to[anchor]
        if anchor in goes_to:  # they point at each other
            attribute = vocabulary.attribute_of(concept.name) if vocabulary is not None else None
            left = [v for v in vocabulary.attributes[attribute] if v not in goes_to] if vocabulary and attribute else []
            if not left:
                raise ConfigError(
                    f"the anchor {goes_to[concept.name]!r} of {concept.name!r} is to be forgotten as well: "
                    "give an --anchor that stays"
                )
            anchor = left[0]
        if anchor != goes_to[concept.name]:
            notes.append(f"{concept.name!r} becomes {anchor!r}: {goes_to[concept.name]!r} is to be forgotten as well")
            concept = replace(concept, anchor=anchor, anchors=(anchor,) * len(concept.synonyms))
        parted.append(concept)
    return parted, notes


def prompts_of(concepts: Sequence[Concept], vocabulary: Vocabulary | None, style: str = "natural") -> Prompts:
    """All prompts of resolved concepts. style: "natural" sentences, or "tags" separated by commas."""
    if vocabulary is not None:
        return _from_vocabulary(concepts, vocabulary)
    return _from_templates(concepts, library()["tags"] if style == "tags" else library())


def mentions(text: str, phrase: str) -> bool:
    """Whether a text holds a phrase as words of its own, in singular or plural."""
    return re.search(rf"(?<!\w){re.escape(phrase.strip())}(s|es)?(?!\w)", text, re.IGNORECASE) is not None


def _told(name: str, anchor: str) -> list[str]:
    return [] if anchor else [f"no anchor for {name!r}: it becomes what the empty prompt gives"]


def _from_vocabulary(concepts: Sequence[Concept], vocabulary: Vocabulary) -> Prompts:
    anchors = {concept.name: concept.anchor or "" for concept in concepts}
    staying = {name: [v for v in values if v not in anchors] for name, values in vocabulary.attributes.items()}
    # a word that becomes nothing has no place in another concept's prompts; one with an anchor becomes that
    usable = {name: [v for v in values if anchors.get(v, v)] for name, values in vocabulary.attributes.items()}

    def pairs(concept: Concept, attribute: str, templates: list[str]) -> tuple[list[Prompt], list[Prompt]]:
        forget = list(vocabulary.prompts(templates, **{**usable, attribute: [concept.name]}))
        if not concept.anchor:
            kept = [{name: anchors.get(v, v) for name, v in p.labels.items() if name != attribute} for p in forget]
            return forget, [Prompt("", labels) for labels in kept]
        becomes = {name: [anchors.get(v, v) for v in values] for name, values in usable.items()}
        return forget, list(vocabulary.prompts(templates, **{**becomes, attribute: [concept.anchor]}))

    def of(concept: Concept) -> ConceptPrompts:
        attribute = vocabulary.attribute_of(concept.name)
        assert attribute is not None
        asked = pairs(concept, attribute, vocabulary.eval)
        return ConceptPrompts(
            *pairs(concept, attribute, vocabulary.train), *asked, attribute, concept.name, concept.anchor or None
        )

    for name, values in staying.items():
        if not values:
            raise ConfigError(f"every {name} that the model knows is to be forgotten: leave one to keep")
    return Prompts(
        [of(concept) for concept in concepts],
        [*vocabulary.prompts(vocabulary.train, **staying), *_own_retain(concepts)],
        list(vocabulary.prompts(vocabulary.eval, **staying)),
    )


def _own_retain(concepts: Sequence[Concept]) -> list[Prompt]:
    return [Prompt(text, {}) for text in dict.fromkeys(text for concept in concepts for text in concept.retain)]


def _without_article(phrase: str) -> str:
    return re.sub(r"^(an?|the)\s+", "", phrase, flags=re.IGNORECASE)


def _from_templates(concepts: Sequence[Concept], texts: dict[str, Any]) -> Prompts:
    def fill(concept: Concept, which: str) -> tuple[list[Prompt], list[Prompt]]:
        forget, anchor = [], []
        for synonym, other in zip(concept.synonyms, concept.anchors, strict=True):
            for template in texts["kinds"][concept.kind][which]:
                forget.append(Prompt(template.replace("{}", synonym), {}))
                anchor.append(Prompt(template.replace("{}", other) if other else "", {}))
        return forget, anchor

    found = [ConceptPrompts(*fill(concept, "train"), *fill(concept, "eval")) for concept in concepts]
    phrases = {phrase for concept in concepts for phrase in (concept.name, *concept.synonyms)}
    taught = {p.text for prompts in found for p in (*prompts.forget, *prompts.anchor)}

    def clean(found: Sequence[str]) -> list[str]:
        return [text for text in dict.fromkeys(found) if not any(mentions(text, phrase) for phrase in phrases)]

    retain = clean([*(p.text for p in _own_retain(concepts)), *texts["retain"]])
    judged = [text for text in clean(texts["retain_eval"]) if text not in retain and text not in taught]
    return Prompts(found, [Prompt(text, {}) for text in retain], [Prompt(text, {}) for text in judged])
