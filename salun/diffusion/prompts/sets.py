"""Sets of prompts that ask how far an erasure reaches, made from the concept: none of them is used in training.

Some must not show the concept any more (synonyms, compositions, other languages), others must stay as they are
(neighbors).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salun.diffusion.prompts.concepts import Concept, Prompts, library, mentions, presets, without_article
from salun.diffusion.prompts.prompt_file import PromptRow
from salun.errors import ConfigError, some

TEXTS = Path(__file__).resolve().parents[2] / "assets" / "prompt_sets.yaml"
NEIGHBORS = 8  # nouns


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are evaluated together.

    Args:
        shows: The concept that the original's images should show; None for prompts that must stay, or of a file.
        preserve: Whether images should be as before.
    """

    name: str
    rows: Sequence[PromptRow]
    shows: str | None = None
    preserve: bool = False


def prompt_sets(
    names: Sequence[str],
    concepts: Sequence[Concept],
    prompts: Prompts,
    phrases: Mapping[str, Sequence[str]] | None = None,
    similar: Callable[[str, Sequence[str]], list[str]] | None = None,
) -> list[PromptSet]:
    """The sets of these names, one for each concept.

    Args:
        names: Of `SETS`.
        concepts: Resolved, of a model without a vocabulary.
        prompts: Theirs; what training uses is skipped.
        phrases: The user's, by set, in place of the preset's synonyms and of proposed neighbors.
        similar: (phrase, nouns) → nouns, the most similar first, for neighbors of objects.

    Raises:
        ConfigError: An unknown set, or one that has no prompts for a concept; neighbors of a concept of which no
            preset says what kind it is.
    """
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise ConfigError(f"is {some(unknown)}, but must be of {', '.join(SETS)}", option="sets")
    trained = {p.text for c in prompts.concepts for p in (*c.forget, *c.anchor)} | {p.text for p in prompts.retain}
    erased = [phrase for concept in concepts for phrase in (concept.name, *concept.synonyms)]
    made = []
    for name in names:
        given = phrases.get(name, ()) if phrases else ()
        for concept in concepts:
            texts = [text for text in SETS[name](concept, given, similar) if text not in trained]
            if name == "neighbors" and not given:  # of a concept, another one that is erased may be near
                texts = [text for text in texts if not any(mentions(text, without_article(each)) for each in erased)]
            if not texts:
                raise ConfigError(
                    f"{name} has no prompts for {concept.name!r}", option="sets", advice=f"Give some by {{{name}}}"
                )
            rows = [PromptRow(text, row=i + 1) for i, text in enumerate(dict.fromkeys(texts))]
            preserve = name == "neighbors"
            label = f"{name}: {concept.name}" if len(concepts) > 1 else name
            made.append(PromptSet(label, rows, None if preserve else concept.name, preserve))
    return made


@cache
def _texts() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    return data


Similar = Callable[[str, Sequence[str]], list[str]]


def _synonyms(concept: Concept, given: Sequence[str], similar: Similar | None) -> list[str]:
    """Other phrases for the concept, in the held-out templates of its kind."""
    phrases = given or [each for each in concept.synonyms if each != concept.name]
    return [template.replace("{}", each) for each in phrases for template in library()["kinds"][concept.kind]["eval"]]


def _compositions(concept: Concept, given: Sequence[str], similar: Similar | None) -> list[str]:
    """The concept together with something that must stay."""
    return [template.replace("{}", concept.synonyms[0]) for template in _texts()["compositions"][concept.kind]]


def _languages(concept: Concept, given: Sequence[str], similar: Similar | None) -> list[str]:
    """Sentences of other languages, with the preset's name there; other concepts keep their name as it is given."""
    names = presets()[concept.preset].get("names", {}) if concept.preset is not None else {}
    templates: dict[str, str] = _texts()["languages"][concept.kind]
    return [text.replace("{}", names.get(language, concept.name)) for language, text in templates.items()]


def _neighbors(concept: Concept, given: Sequence[str], similar: Similar | None) -> list[str]:
    """What is near the concept and must stay: given, or of a preset nouns near its object, or the other styles.

    Raises:
        ConfigError: None are given for a concept of another kind, or without a preset, whose kind is not known.
    """
    templates = library()["kinds"][concept.kind]["eval"]
    if given:
        return [template.replace("{}", each) for each in given for template in templates]
    if concept.preset is None or concept.kind not in ("object", "style"):
        kind = "free text of no known kind" if concept.preset is None else f"of the kind {concept.kind}"
        raise ConfigError(
            f"is neighbors, but none are known of {concept.name!r}, which is {kind}",
            option="sets",
            advice="Give what is near it and must stay by {neighbors}",
        )
    if concept.kind == "style":
        others = [each for name, each in presets().items() if name != concept.preset]
        near = [each["synonyms"][0] for each in others if each["kind"] == concept.kind]
    else:
        near = similar(concept.synonyms[0], other_nouns(concept))[:NEIGHBORS] if similar is not None else []
    return [template.replace("{}", each) for each in near for template in templates[:2]]


@cache
def other_nouns(concept: Concept) -> tuple[str, ...]:
    """Nouns among which to look for what is near a concept: all that name neither it nor its anchor."""
    phrases = [without_article(each) for each in (concept.name, *concept.synonyms, *concept.anchors) if each]
    every = itertools.chain.from_iterable(_texts()["nouns"])
    return tuple(noun for noun in every if not any(mentions(noun, each) or mentions(each, noun) for each in phrases))


SETS: dict[str, Callable[[Concept, Sequence[str], Similar | None], list[str]]] = {
    "synonyms": _synonyms,
    "compositions": _compositions,
    "languages": _languages,
    "neighbors": _neighbors,
}
