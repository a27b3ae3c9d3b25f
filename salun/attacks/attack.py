"""The interface of attacks on unlearned models, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Generic, Literal, TypeVar

TargetT = TypeVar("TargetT")
OptionsT = TypeVar("OptionsT")

ATTACKS = {  # name → the attack, imported when it is used
    "mia": "salun.attacks.mia:MIA",
    "relearning": "salun.attacks.relearning:RELEARNING",
}


@dataclass(frozen=True)
class Attack(Generic[TargetT, OptionsT]):
    """An attempt to bring back, or to detect, what a model has unlearned.

    Args:
        title: As in tables.
        paper: Its source.
        against: What it attacks.
        options: Dataclass of its options.
        settings: A run's options → the attack's, or None if the run does not include it.
        run: Attack a target. Returns entries of the metrics in `run.json`.
    """

    name: str
    title: str
    paper: str
    against: Literal["classifier", "diffusion"]
    options: type[OptionsT]
    settings: Callable[[Any], OptionsT | None]
    run: Callable[[TargetT, OptionsT], dict[str, Any]]


def attack(name: str) -> Attack[Any, Any]:
    """The attack of a name in `ATTACKS`."""
    resolved: Attack[Any, Any] = resolve_name(ATTACKS[name])
    return resolved


def requested(against: str, options: Any) -> list[str]:
    """The names of the attacks that a run's options include. against: what the run unlearns."""
    made = {name: attack(name) for name in ATTACKS}
    return [name for name, of in made.items() if of.against == against and of.settings(options) is not None]
