"""The words a model is known to understand: attributes with their values, and templates that name all of them.

A model carries this in its `salun.yaml` when a detector can read the same attributes off its pictures. Then prompts to
forget, to keep and to judge follow from the concept's name alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from salun.errors import ConfigError, DataError
from salun.user_text import composed


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a picture of it should show: attribute → value (empty where nothing can read it)."""

    text: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """attributes: name → values. train, eval: templates with a slot per attribute, disjoint. anchors: value → value."""

    attributes: dict[str, list[str]]
    train: list[str]
    eval: list[str]
    anchors: dict[str, str]

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Vocabulary:
        """From a `vocabulary` block. Raises DataError if a part is missing or the templates do not fit."""
        try:
            templates = data["templates"]
            found = cls(
                {str(k): [composed(str(v)) for v in values] for k, values in data["attributes"].items()},
                [str(t) for t in templates["train"]],
                [str(t) for t in templates["eval"]],
                {composed(str(k)): composed(str(v)) for k, v in data.get("anchors", {}).items()},
            )
            first = {name: values[0] for name, values in found.attributes.items()}
            for template in found.train + found.eval:
                if any("{" + name + "}" not in template for name in first):
                    raise ValueError(f"template {template!r} does not name every attribute")
                template.format(**first)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{where}: the vocabulary cannot be used: {error!r}") from error
        return found

    def attribute_of(self, value: str) -> str | None:
        """The attribute that has this value, or None."""
        return next((name for name, values in self.attributes.items() if value in values), None)

    def require(self, value: str, model: str) -> str:
        """The attribute of a value. Raises ConfigError that lists what the model knows."""
        attribute = self.attribute_of(value)
        if attribute is None:
            known = "; ".join(f"{name}: {', '.join(values)}" for name, values in self.attributes.items())
            raise ConfigError(f"the model {model} knows no {value!r}. It knows {known}")
        return attribute

    def prompts(self, templates: list[str], **fixed: list[str]) -> Iterator[Prompt]:
        """Every template with every combination of values; `fixed` narrows an attribute to some values."""
        names = list(self.attributes)
        choices = [fixed.get(name, self.attributes[name]) for name in names]
        for template in templates:
            for values in itertools.product(*choices):
                labels = dict(zip(names, values, strict=True))
                yield Prompt(template.format(**labels), labels)
