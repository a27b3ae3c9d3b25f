"""The options of `salun attack`, and the attacks that they name. Nothing heavy is imported: help is made from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from salun.attacks import ATTACKS, Attack
from salun.detectors import DETECTORS
from salun.diffusion.eval_options import GROUPS as EVAL_GROUPS
from salun.diffusion.eval_options import ComparedOptions
from salun.errors import ConfigError
from salun.options import NoOptions, entry_of, from_mapping, option
from salun.untrusted import parse_yaml

BUDGETS = ("small", "paper")


@dataclass(frozen=True)
class ChosenAttack:
    """An attack with its numbers.

    Args:
        text: As it is written.
        argument: What follows its name after a colon, "" for nothing.
        options: Its own.
    """

    text: str
    attack: Attack
    argument: str
    options: Any

    @property
    def title(self) -> str:
        """As in tables: with what is not as in the small budget."""
        standard = self.attack.options()
        values = {item.name: getattr(self.options, item.name) for item in fields(self.options)}
        others = [f"{name} {value}" for name, value in values.items()
                  if value is not None and value != getattr(standard, name)]  # fmt: skip
        shown = [re.split(r"[/\\]", self.argument)[-1]] if self.argument else []
        return self.attack.title + (f" ({', '.join(shown + others)})" if shown or others else "")


@dataclass(frozen=True)
class AttackOptions(ComparedOptions):
    """How to attack a model."""

    attack: list[str] = option(
        [],
        f"Attack ({', '.join(ATTACKS['diffusion'])}), or ATTACK+OPTION=VALUE+… such as inversion+steps=400; merge may "
        "be followed by a colon and a model, lora and prompts must be by a file; repeatable",
        auto="all that need no file, and that the model can have",
        path=True,
    )
    budget: str = option(
        "small", "Numbers of each attack: of a few minutes for a small model, or its paper's", choices=BUDGETS
    )
    detector: str | None = option(
        None,
        f"Detector that decides about success ({', '.join(DETECTORS)}), with an argument after a colon where it takes "
        "one",
        auto="the run's; else the classifier in the model's folder, else self: the original model as classifier",
    )
    n: int = option(32, "Prompts that are attacked, of each concept", minimum=2, maximum=100_000)
    images: int = option(32, "The original's images of the concept that attacks learn from", minimum=1, maximum=100_000)
    control: bool = option(
        False, "Attack the original as well: an attack that does not work there says nothing about the erased model"
    )

    @property
    def attacks(self) -> list[ChosenAttack]:
        """The attacks, in order. Raises ConfigError for one that is not valid, or repeated."""
        names = self.attack or [name for name, of in ATTACKS["diffusion"].items() if of.default]
        chosen = [attack_of(name, self.budget) for name in names]
        twice = next((each.text for i, each in enumerate(chosen) if each.text in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"has {twice} twice", option="attack")
        return chosen


def attack_of(text: str, budget: str = "small") -> ChosenAttack:
    """The attack that ATTACK[:ARGUMENT][+OPTION=VALUE+…] names. Raises ConfigError for anything else."""
    named, *parts = re.split(rf"\+(?={_names(text)}=)", text.strip())
    attack, argument = entry_of(named, ATTACKS["diffusion"], "attack")
    if not attack.default and not argument:
        raise ConfigError(
            f"is {text[:60]!r}, which needs a {attack.argument.lower()}",
            option="attack",
            advice=f"Name it after a colon: {{attack}} {attack.name}:{attack.argument}",
        )
    values = dict(attack.paper_budget) if budget == "paper" else {}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            values[name.replace("-", "_")] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"has {part[:60]!r}, whose value cannot be read", option="attack") from error
    if values and attack.options is NoOptions:
        raise ConfigError(f"has {text[:60]!r}, but {attack.name} has no options", option="attack")
    return ChosenAttack(text.strip(), attack, argument, from_mapping(attack.options, values, f"attack {text[:60]}"))


def with_prompts_only(text: str, look_up: Callable[[str], str | Path]) -> str:
    """Accept an attack whose argument, if it has one, is a file of prompts, for hosts with remote users.

    Args:
        look_up: Its name there → its path. Raises ConfigError for one that is not there.

    Raises:
        ConfigError: The attack would take another file, or a model.
    """
    name, _, argument = text.strip().partition(":")
    if not argument:
        return text
    if name != "prompts":
        raise ConfigError(
            f"is {text[:80]!r}, but {name[:40]} can name no file or model here",
            option="attack",
            advice="Use the command line for it",
        )
    return f"{name}:{look_up(argument)}"


def _names(text: str) -> str:
    """A regular expression of the options that an attack may be followed by: after an argument, only those it has."""
    attack = ATTACKS["diffusion"].get(text.strip().partition(":")[0])
    if attack is None or not attack.argument:
        return "[a-z_-]+"
    return "(?:" + "|".join(item.name.replace("_", "[_-]") for item in fields(attack.options)) + ")"


GROUPS = {
    "What": ("concept", "anchor", "against", "attack", "budget", "control", "detector", "clip", "n", "images"),
    **{title: names for title, names in EVAL_GROUPS.items() if title in ("Model", "Sampling", "Computing")},
    "Output": ("show_sensitive",),
}
