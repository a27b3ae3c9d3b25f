"""Errors as data: each host (command line, nodes, tab, Python) renders them with its own names of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


class SalunError(Exception):
    """Any error that salun raises on purpose.

    Args:
        message: What is wrong with what, without a final period. Where `option` is given, a predicate of that option:
            "is 3, but must be at most 1".
        option: Name of the option at fault, as in the option dataclasses ("batch_size").
        advice: What to do, one sentence without a final period. Options in it are names in braces, "use a smaller
            {batch_size}", so foreign text goes through `literal`.
        code: The kind of error in a word ("exists"), by which a host may choose advice of its own.
    """

    def __init__(self, message: str = "", *, option: str | None = None, advice: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message, self.option, self.advice, self.code = message, option, advice, code

    def __str__(self) -> str:
        return describe(self)


class ConfigError(SalunError):
    """An option that cannot be read, is out of range, or contradicts another."""


class ModelError(SalunError):
    """A model that cannot be found, read, or is of a kind salun does not handle."""


class MaskError(SalunError):
    """A mask that does not fit its model, or cannot be made."""


class DataError(SalunError):
    """Data (prompts, latents, images, detectors) that cannot be used."""


class TrainingError(SalunError):
    """Training that went wrong: a loss that is not finite."""


class Cancelled(SalunError):
    """The user asked to stop.

    Args:
        line: A message for the user, where the handler has none of its own.
    """

    def __init__(self, message: str = "", *, line: str | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Spelled(dict[str, str]):
    """Option names → how a host spells them, made on access."""

    def __init__(self, spell: Callable[[str], str]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, name: str) -> str:
        return self._spell(name)


def describe(error: SalunError, spell: Callable[[str], str] = str, advice: Mapping[str, str] | None = None) -> str:
    """An error as a line for people.

    Args:
        spell: Option name → how the host spells it, such as "--batch-size"; by default the name itself.
        advice: Code → the host's own advice, in place of the error's; "" for none.
    """
    subject = f"{spell(error.option)} " if error.option else ""
    todo = (advice or {}).get(error.code, error.advice) if error.code else error.advice
    end = "" if error.message.endswith("?") else "."
    return f"{subject}{error.message}" + (f"{end} {fill(todo, spell)}" if todo else "")


def fill(template: str, spell: Callable[[str], str]) -> str:
    """A text with option names in braces, each as the host spells it."""
    return template.format_map(_Spelled(spell))


def literal(text: object) -> str:
    """A text to put into an advice as it is, braces and all."""
    return str(text).replace("{", "{{").replace("}", "}}")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, as a message lists them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
