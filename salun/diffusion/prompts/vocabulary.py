"""The vocabulary of a model: attributes with their values, and prompt templates that name all attributes.

A model has one in its `salun.yaml` if a detector recognizes the same attributes in its images. Then all prompts, for
training and evaluation, follow from the concept's name alone.
"""

from __future__ import annotations

import difflib
import itertools
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from salun.errors import ConfigError, DataError, some
from salun.user_text import composed

PROMPTS = 20_000  # limit of one vocabulary; that of `shapes` makes 1,920
TEMPLATE, VALUE = 1_000, 100  # limits in characters
SLOTS = 50  # limit of one template
SHOWN = 8  # values of an attribute in a message


class UnknownConcept(ConfigError):
    """A concept that is not in a model's vocabulary. model: the model's name."""

    def __init__(self, message: str, model: str, *, advice: str = "") -> None:
        super().__init__(message, advice=advice, code="unknown-concept")
        self.model = model


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what an image of it should show: attribute → value (empty if no detector can tell)."""

    text: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """The concepts that a model knows.

    Args:
        attributes: Attribute → its values.
        train, eval: Disjoint templates with a slot for each attribute.
        anchors: Value → its default anchor.
    """

    attributes: dict[str, list[str]]
    train: list[str]
    eval: list[str]
    anchors: dict[str, str]

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Vocabulary:
        """From an untrusted `vocabulary` block. Raises DataError if a part is missing or the templates do not fit."""
        try:
            templates = _lists(data["templates"], "templates", TEMPLATE)
            vocabulary = cls(
                _lists(data["attributes"], "attributes", VALUE),
                templates["train"],
                templates["eval"],
                {_text(k, VALUE): _text(v, VALUE) for k, v in data.get("anchors", {}).items()},
            )
            count = len(vocabulary.train + vocabulary.eval) * prod(map(len, vocabulary.attributes.values()))
            if not 1 <= count <= PROMPTS:
                raise ValueError(f"templates and attributes make {count:,} prompts; the limit is {PROMPTS:,}")
            for template in vocabulary.train + vocabulary.eval:
                _check_template(template, vocabulary.attributes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: the vocabulary is invalid: {reason}") from error
        return vocabulary

    def attribute_of(self, value: str) -> str | None:
        """The attribute that has this value, or None."""
        return next((name for name, values in self.attributes.items() if value in values), None)

    def value_of(self, text: str) -> str:
        """The value that a text names as it is or as ATTRIBUTE:VALUE; else the text.

        ATTRIBUTE:NUMBER counts from 0, where no value of the attribute is a number itself.
        """
        attribute, _, value = (part.strip() for part in text.partition(":"))
        values = self.attributes.get(attribute, [])
        if self.attribute_of(text) is not None or not values:
            return text
        if value in values:
            return value
        named = any(each.isascii() and each.isdigit() for each in values)
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else len(values)
        return values[number] if number < len(values) and not named else text

    def require(self, value: str, model: str) -> str:
        """The attribute of a value. Raises UnknownConcept with what is near for an unknown value."""
        attribute = self.attribute_of(value)
        if attribute is None:
            near = difflib.get_close_matches(value, [each for of in self.attributes.values() for each in of], 3)
            known = "; ".join(f"{name}: {some(values, SHOWN)}" for name, values in self.attributes.items())
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f" ({known})"
            raise UnknownConcept(f"{value!r} is not in the vocabulary of the model {model}{hint}", model)
        return attribute

    def prompts(self, templates: list[str], **fixed: list[str]) -> Iterator[Prompt]:
        """Every template with every combination of values; `fixed` restricts the values of an attribute."""
        names = list(self.attributes)
        choices = [fixed.get(name, self.attributes[name]) for name in names]
        for template in templates:
            for values in itertools.product(*choices):
                labels = dict(zip(names, values, strict=True))
                yield Prompt(template.format(**labels), labels)


def _lists(data: Mapping[str, Any], name: str, longest: int) -> dict[str, list[str]]:
    """Name → texts, checked. Raises ValueError for an empty list."""
    if not isinstance(data, dict) or not all(isinstance(texts, list) and texts for texts in data.values()):
        raise ValueError(f"{name} must be names, each with a list of texts")
    return {_text(key, VALUE): [_text(text, longest) for text in texts] for key, texts in data.items()}


def _text(value: Any, longest: int) -> str:
    """A text of a vocabulary, checked; numbers and booleans of YAML become texts. Raises ValueError."""
    text = str(value)
    if isinstance(value, dict | list) or not 1 <= len(text) <= longest:
        raise ValueError(f"{text[:40]!r} must be a text of 1 to {longest} characters")
    return composed(text)


def _check_template(template: str, attributes: Mapping[str, list[str]]) -> None:
    """Raise ValueError unless the slots are bare names of attributes, without a format such as {shape:9999999}."""
    slots = [(name, form, change) for _, name, form, change in string.Formatter().parse(template) if name is not None]
    odd = next((slot for slot in slots if slot[0] not in attributes or slot[1] or slot[2]), None)
    if odd is not None:
        raise ValueError(
            f"template {template[:80]!r} has a slot {odd[0][:40]!r} that is not the bare name of an attribute"
        )
    if {name for name, _, _ in slots} != set(attributes):
        raise ValueError(f"template {template[:80]!r} does not name every attribute")
    if len(slots) > SLOTS:
        raise ValueError(f"template {template[:80]!r} has {len(slots)} slots; the limit is {SLOTS}")
