"""Concepts and their prompts: of the concept, of its anchor and to retain, for training and for evaluation.

Training prompts and evaluation prompts are disjoint.
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
    """A concept to erase.

    Args:
        name: Name of a preset, a value of the model's vocabulary, or any text.
        anchor: What the model shows in its place. "" is the empty prompt; None is the preset's anchor, or the empty
            prompt without a preset.
        retain: Retain prompts, added to the default ones.
        synonyms, anchors: Pairs of phrases for the templates of the kind.
        kind: "object", "style", "person" or "content".
        sensitive: Whether hosts blur its images by default.
        preset: Name of the preset, set by `resolve`.
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
        for name, option in _FIELD_OPTIONS.items():
            object.__setattr__(self, name, _normalized(getattr(self, name), option))
        if not self.name.strip():
            raise ConfigError("is empty", option="concept", advice="Name what the model should forget, such as circle")
        if self.anchor is not None and self.anchor.strip() == self.name.strip():
            raise ConfigError(
                f"is {self.name!r}, which is the concept itself", option="anchor", advice="Name another anchor"
            )


_FIELD_OPTIONS = {
    "name": "concept", "anchor": "anchor", "retain": "retain_prompts", "synonyms": "concept", "anchors": "anchor"
}  # fmt: skip


def _normalized(value: Any, option: str) -> Any:
    """A text, a tuple of texts, or None, as `prompt_text`. Raises ConfigError for text that is not Unicode."""
    if isinstance(value, str):
        return prompt_text(checked(value, option))
    return value if value is None else tuple(_normalized(each, option) for each in value)


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of one concept.

    `anchor[i]` belongs to `forget[i]`, and `eval_anchor[i]` to `eval_forget[i]`. The labels of an anchor prompt are
    what an image of the forget prompt should show once the concept is erased. `attribute`, `value` and `anchor_value`
    are the concept's entry in the model's vocabulary, or None.
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
    """The prompts of one erasure: those of each concept, and retain prompts, which mention no concept."""

    concepts: list[ConceptPrompts]
    retain: list[Prompt]
    eval_retain: list[Prompt]

    @property
    def digest(self) -> str:
        """SHA-256 of all texts in their order."""
        lists = [each for c in self.concepts for each in (c.forget, c.anchor, c.eval_forget, c.eval_anchor)]
        texts = [[prompt.text for prompt in each] for each in (*lists, self.retain, self.eval_retain)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@cache
def library() -> dict[str, Any]:
    """The preset library: kinds with templates, retain prompts, presets."""
    data: dict[str, Any] = yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))
    return data


def presets() -> dict[str, dict[str, Any]]:
    """Preset name → its entry."""
    entries: dict[str, dict[str, Any]] = library()["presets"]
    return entries


def resolve(
    concept: Concept, vocabulary: Vocabulary | None, model: str, style: str = "natural"
) -> tuple[Concept, list[str]]:
    """The concept with every field filled in, and notes for the user.

    A preset is found by its name or an alias. Any other text is used as it is, except with a vocabulary.

    Args:
        vocabulary: The vocabulary of the model, the only concepts it knows; None for a model of free text.
        model: Name of the model, for errors.
        style: "natural", or "tags" for phrases without articles and the tags of presets.

    Raises:
        ConfigError: The concept or its anchor is not in the vocabulary, or they are of different attributes.
    """
    notes: list[str] = []
    if vocabulary is not None:
        resolved = _of_vocabulary(concept, vocabulary, model, style)
    else:
        key = concept.name.strip().lower()
        names = {name: name for name in presets()}
        names.update({alias.lower(): name for name, entry in presets().items() for alias in entry.get("aliases", [])})
        if key in names:
            resolved = _of_preset(concept, names[key], style)
        else:
            resolved = _of_text(concept)
            near = difflib.get_close_matches(key, names, 1, 0.8)
            if near:
                notes.append(f"{concept.name!r} is not a preset (did you mean {near[0]!r}?): used as free text")
    if not resolved.anchor:
        notes.append(f"no anchor for {concept.name!r}: it becomes what the empty prompt shows")
    return resolved, notes


def _of_vocabulary(concept: Concept, vocabulary: Vocabulary, model: str, style: str) -> Concept:
    if style != "natural":
        raise ConfigError(
            f"is {style}, but {model} has its own prompts", option="prompt_style", advice="Omit {prompt_style}"
        )
    concept = replace(concept, name=vocabulary.value_of(concept.name))
    attribute = vocabulary.require(concept.name, model)
    anchor = concept.anchor if concept.anchor is not None else vocabulary.anchors.get(concept.name, "")
    anchor = vocabulary.value_of(anchor)
    if anchor and vocabulary.require(anchor, model) != attribute:
        others = ", ".join(value for value in vocabulary.attributes[attribute] if value != concept.name)
        raise ConfigError(
            f"is {anchor!r}, but must be a {attribute} as {concept.name!r} is: one of {others}", option="anchor"
        )
    return replace(concept, anchor=anchor)


def _of_text(concept: Concept) -> Concept:
    anchor = concept.anchor or ""
    synonyms, anchors = concept.synonyms or (concept.name,), concept.anchors or (anchor,)
    if len(anchors) == 1:
        anchors = anchors * len(synonyms)
    return replace(concept, anchor=anchor, synonyms=synonyms, anchors=anchors)


def _of_preset(concept: Concept, name: str, style: str) -> Concept:
    entry = presets()[name]
    synonyms, anchors = tuple(entry["synonyms"]), tuple(entry["anchors"])
    anchor = anchors[0] if concept.anchor is None else concept.anchor
    if concept.anchor is not None:
        anchors = (anchor,) * len(synonyms)
    if style == "tags":
        if concept.anchor is None:
            anchors = tuple(entry.get("tag_anchors") or map(without_article, anchors))
        synonyms = tuple(entry.get("tags") or map(without_article, synonyms))
        anchors = anchors if len(anchors) == len(synonyms) else (without_article(anchor),) * len(synonyms)
    return Concept(
        name=concept.name,
        anchor=anchor,
        retain=(*entry["retain"], *concept.retain),
        synonyms=synonyms,
        anchors=anchors,
        kind=entry["kind"],
        sensitive=bool(entry.get("sensitive", False)),
        preset=name,
    )


def part(concepts: Sequence[Concept], vocabulary: Vocabulary | None) -> tuple[list[Concept], list[str]]:
    """Resolved concepts with anchors that are not erased, and notes for the user.

    An anchor that is itself to be erased is replaced by its own anchor, and so on, or by any value that is not erased.

    Raises:
        ConfigError: A concept is given twice, or no value is left as an anchor.
    """
    names = [concept.name for concept in concepts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{repeated[0]} is given twice", option="concept", advice="Name each concept once")
    anchors = {concept.name: concept.anchor or "" for concept in concepts}
    resolved, notes = [], []
    for concept in concepts:
        first = anchors[concept.name]
        anchor, seen = first, {concept.name}
        while anchor in anchors and anchor not in seen:
            seen.add(anchor)
            anchor = anchors[anchor]
        if anchor in anchors:  # the anchors form a circle
            attribute = vocabulary.attribute_of(concept.name) if vocabulary is not None else None
            left = [v for v in vocabulary.attributes[attribute] if v not in anchors] if vocabulary and attribute else []
            if not left:
                raise ConfigError(
                    f"of {concept.name!r} is {first!r}, which is to be erased as well",
                    option="anchor",
                    advice="Choose an {anchor} that is not erased",
                )
            anchor = left[0]
        if anchor != first:
            notes.append(f"{concept.name!r} becomes {anchor!r}: {first!r} is to be erased as well")
            concept = replace(concept, anchor=anchor, anchors=(anchor,) * len(concept.synonyms))
        resolved.append(concept)
    return resolved, notes


def prompts_of(concepts: Sequence[Concept], vocabulary: Vocabulary | None, style: str = "natural") -> Prompts:
    """All prompts of resolved concepts. style: "natural" sentences, or "tags" separated by commas."""
    if vocabulary is not None:
        return _from_vocabulary(concepts, vocabulary)
    return _from_templates(concepts, library()["tags"] if style == "tags" else library())


def mentions(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase as separate words, in singular or plural."""
    return re.search(rf"(?<!\w){re.escape(phrase.strip())}(s|es)?(?!\w)", text, re.IGNORECASE) is not None


def _from_vocabulary(concepts: Sequence[Concept], vocabulary: Vocabulary) -> Prompts:
    anchors = {concept.name: concept.anchor or "" for concept in concepts}
    staying = {name: [v for v in values if v not in anchors] for name, values in vocabulary.attributes.items()}
    # a value without an anchor is in no prompt of another concept; one with an anchor is replaced by it
    usable = {name: [v for v in values if anchors.get(v, v)] for name, values in vocabulary.attributes.items()}

    def pairs(concept: Concept, attribute: str, templates: list[str]) -> tuple[list[Prompt], list[Prompt]]:
        forget = list(vocabulary.prompts(templates, **{**usable, attribute: [concept.name]}))
        if not concept.anchor:
            others = [{name: anchors.get(v, v) for name, v in p.labels.items() if name != attribute} for p in forget]
            return forget, [Prompt("", labels) for labels in others]
        becomes = {name: [anchors.get(v, v) for v in values] for name, values in usable.items()}
        return forget, list(vocabulary.prompts(templates, **{**becomes, attribute: [concept.anchor]}))

    def of(concept: Concept) -> ConceptPrompts:
        attribute = vocabulary.attribute_of(concept.name)
        assert attribute is not None
        training, evaluation = (pairs(concept, attribute, part) for part in (vocabulary.train, vocabulary.eval))
        return ConceptPrompts(*training, *evaluation, attribute, concept.name, concept.anchor or None)

    for name, values in staying.items():
        if not values:
            raise ConfigError(
                f"names every {name} of the vocabulary, so that nothing is left to retain", option="concept"
            )
    return Prompts(
        [of(concept) for concept in concepts],
        [*vocabulary.prompts(vocabulary.train, **staying), *_additional_retain(concepts)],
        list(vocabulary.prompts(vocabulary.eval, **staying)),
    )


def _additional_retain(concepts: Sequence[Concept]) -> list[Prompt]:
    """Given ones, but for those that mention a concept, which would keep it in the model."""
    left_out = mentioning(concepts)
    texts = dict.fromkeys(text for concept in concepts for text in concept.retain)
    return [Prompt(text, {}) for text in texts if text not in left_out]


def mentioning(concepts: Sequence[Concept]) -> list[str]:
    """The given retain prompts that mention one of the concepts."""
    phrases = [phrase for concept in concepts for phrase in (concept.name, *concept.synonyms)]
    texts = dict.fromkeys(text for concept in concepts for text in concept.retain)
    return [text for text in texts if any(mentions(text, phrase) for phrase in phrases)]


def without_article(phrase: str) -> str:
    """A phrase without its leading a, an or the."""
    return re.sub(r"^(an?|the)\s+", "", phrase, flags=re.IGNORECASE)


def _from_templates(concepts: Sequence[Concept], texts: dict[str, Any]) -> Prompts:
    def fill(concept: Concept, which: str) -> tuple[list[Prompt], list[Prompt]]:
        forget, anchor = [], []
        for synonym, other in zip(concept.synonyms, concept.anchors, strict=True):
            for template in texts["kinds"][concept.kind][which]:
                forget.append(Prompt(template.replace("{}", synonym), {}))
                anchor.append(Prompt(template.replace("{}", other) if other else "", {}))
        return forget, anchor

    filled = [ConceptPrompts(*fill(concept, "train"), *fill(concept, "eval")) for concept in concepts]
    phrases = {phrase for concept in concepts for phrase in (concept.name, *concept.synonyms)}
    trained = {p.text for prompts in filled for p in (*prompts.forget, *prompts.anchor)}

    def clean(texts: Sequence[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if not any(mentions(text, phrase) for phrase in phrases)]

    retain = clean([*(p.text for p in _additional_retain(concepts)), *texts["retain"]])
    held_out = [text for text in clean(texts["retain_eval"]) if text not in retain and text not in trained]
    return Prompts(filled, [Prompt(text, {}) for text in retain], [Prompt(text, {}) for text in held_out])
