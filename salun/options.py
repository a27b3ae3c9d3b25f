"""Every option once: name, default, help, range. The CLI, nodes, tab and config files are made from these dataclasses.

`None` stands for `auto`: the number comes from the model's recipe (data in the model's folder or in the alias table).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from salun.errors import ConfigError
from salun.user_text import checked, unquoted

BY_GRADIENT = ("saliency", "saliency-ratio", "saliency-by-layer", "shuffled")  # masks that saliency scores decide
MASKS = (*BY_GRADIENT, "random", "full")


def option(
    default: Any,
    help: str,
    *,
    auto: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    expert: bool = False,
) -> Any:
    """A dataclass field with the metadata of an option.

    Args:
        help: A noun phrase or an imperative, without a final period.
        auto: What an unset option stands for; the metadata's `help` ends with it.
        minimum, maximum, above: The range; `minimum` and `maximum` are inclusive, `above` is exclusive.
        choices: The valid values.
        path: The option names files or folders, so that quotes around a value are removed.
        expert: Hosts may show the option apart from those that most people need.
    """
    rules = {
        "help": help + (f" (default: {auto})" if auto else ""), "text": help, "auto": auto, "minimum": minimum,
        "maximum": maximum, "above": above, "choices": choices, "path": path, "expert": expert,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


class TakesArgument(Protocol):
    """An entry of a registry whose names may be followed by an argument; argument: what it is, "" for nothing."""

    @property
    def argument(self) -> str:
        """Such as "FOLDER"."""


Entry = TypeVar("Entry", bound=TakesArgument)


def entry_of(name: str, entries: Mapping[str, Entry], option: str) -> tuple[Entry, str]:
    """The entry that "name" or "name:argument" names, and the argument.

    Raises:
        ConfigError: There is no such entry, or it takes no argument; option: the one to blame.
    """
    key, _, argument = name.partition(":")
    entry = entries.get(key)
    if entry is None:
        raise ConfigError(f"is {name!r}, but must be one of {', '.join(entries)}", option=option)
    if argument and not entry.argument:
        raise ConfigError(f"is {name!r}, but {key} takes no argument", option=option, advice=f"Use {{{option}}} {key}")
    return entry, argument


@cache
def option_types(kind: Any) -> dict[str, tuple[type, bool]]:
    """Option name → the type of its value (bool, int, float, str or list, of texts), and whether it may be None."""
    types = {}
    for name, hint in get_type_hints(kind).items():
        optional = NoneType in get_args(hint)
        inner = get_args(hint)[0] if optional else hint
        types[name] = (get_origin(inner) or inner, optional)
    return types


class Checked:
    """Base of the option dataclasses: validates every field when an instance is made, and raises ConfigError."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for item in dataclasses.fields(kind):
            value = getattr(self, item.name)
            if option_types(kind)[item.name][0] is list and isinstance(value, str):
                value = [value]  # from Python, one text is as good as a list of one
            if item.metadata.get("path"):
                value = [_unquoted(each) for each in value] if isinstance(value, list) else _unquoted(value)
            object.__setattr__(self, item.name, value)
            check(item.name, value, item.metadata)


@dataclass(frozen=True)
class NoOptions(Checked):
    """The options of a method that has none of its own."""


def _unquoted(value: Any) -> Any:
    return unquoted(value) if isinstance(value, str) else value


def check(name: str, value: Any, rules: Any) -> None:
    """Raise ConfigError if `value` breaks the rules of option `name`."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            checked(text, name)
    if value is None or isinstance(value, list | bool | Path):
        return
    if rules.get("choices") and value not in rules["choices"]:
        raise ConfigError(f"is {value!r}, but must be one of {', '.join(rules['choices'])}", option=name)
    if isinstance(value, int | float):
        low, high, above = rules.get("minimum"), rules.get("maximum"), rules.get("above")
        if value != value or (low is not None and value < low) or (above is not None and value <= above):
            bound = f"at least {low}" if low is not None else f"above {above}"
            raise ConfigError(f"is {value}, but must be {bound}", option=name)
        if high is not None and value > high:
            raise ConfigError(f"is {value}, but must be at most {high}", option=name)


@dataclass(frozen=True)
class DeviceOptions(Checked):
    """Where and how to compute."""

    device: str = option("auto", "Compute device: auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto",
        "Compute dtype; auto is bf16 where the GPU supports it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class FileOptions(Checked):
    """Where to find a model, and whether a pickle may be read."""

    models_dir: list[str] = option(
        [],
        "Folder to search for checkpoints by name: a checkpoint folder, or the root of a WebUI or ComfyUI; repeatable "
        "(SALUN_MODELS_DIR adds more)",
        path=True,
    )
    allow_pickle: bool = option(
        False, "Allow .ckpt (pickle) files; loaded with weights_only and converted to safetensors in the cache"
    )


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list of texts"}


def from_mapping(kind: type, values: Any, where: str) -> Any:
    """An option dataclass made of untrusted data.

    Args:
        kind: The dataclass.
        values: Option name → value, expected to be a dict.
        where: The source, such as a file, as errors name it; "" if they need not.

    Raises:
        ConfigError: An unknown name (the nearest known one is the advice), a wrong type or a value out of range.
    """
    if not isinstance(values, dict):
        raise _located(ConfigError(f"expected names and values, got {type(values).__name__}"), where)
    types = option_types(kind)
    for key, value in values.items():
        if key not in types:
            raise _located(_unknown(str(key)[:80], types), where)
        if not _fits(value, *types[key]):
            wanted = _TYPE_NAMES[types[key][0]]
            raise _located(ConfigError(f"is {_shown(value)}, but must be {wanted}", option=key), where)
    try:
        return kind(**{key: int(v) if types[key][0] is int and v is not None else v for key, v in values.items()})
    except ConfigError as error:
        if not where:
            raise
        raise _located(error, where) from error


def _unknown(name: str, known: Any) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    return ConfigError(f"unknown option {name!r}", advice=f"Did you mean {near[0]!r}?" if near else "")


def _located(error: ConfigError, where: str) -> ConfigError:
    """The error with its source in the message. A file spells its options by their plain names."""
    if not where:
        return error
    subject = f"{error.option} " if error.option else ""
    return ConfigError(f"{where}: {subject}{error.message}", advice=error.advice, code=error.code)


def _fits(value: Any, kind: type, optional: bool) -> bool:
    """Whether an untrusted value is of an option's type; whole floats are integers too."""
    if value is None:
        return optional
    if kind is list:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value.is_integer() if kind is int else not math.isnan(value)


def _shown(value: Any) -> str:
    """A value as a message can hold it; Python prints no integer of more than 4,300 digits."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a very large number"
