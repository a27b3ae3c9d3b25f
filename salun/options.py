"""Every option once: name, default, help, range. The CLI, nodes, tab and config files are made from these dataclasses.

`None` stands for `auto`: the number comes from the model's recipe (data beside the model or in the alias table).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salun.errors import ConfigError
from salun.user_text import checked, unquoted

MASKS = ("saliency", "shuffled", "random", "full")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
) -> Any:
    """A field with its help and range. `minimum` and `maximum` are inclusive, `above` is not.

    path: it names files or folders (or may), so that quotes around it are no part of it.
    """
    rules = {"help": help, "minimum": minimum, "maximum": maximum, "above": above, "choices": choices, "path": path}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


class Checked:
    """Validates every field against its range and choices when made. Raises ConfigError naming the option."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
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
    """Raises ConfigError if `value` breaks the rules of option `name`."""
    flag = "--" + name.replace("_", "-")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            checked(text, flag)
    if value is None or isinstance(value, list | bool | Path):
        return
    if rules.get("choices") and value not in rules["choices"]:
        raise ConfigError(f"{flag} is {value!r}, but must be one of {', '.join(rules['choices'])}")
    if isinstance(value, int | float):
        low, high, above = rules.get("minimum"), rules.get("maximum"), rules.get("above")
        if value != value or (low is not None and value < low) or (above is not None and value <= above):
            bound = f"at least {low}" if low is not None else f"above {above}"
            raise ConfigError(f"{flag} is {value}, but must be {bound}")
        if high is not None and value > high:
            raise ConfigError(f"{flag} is {value}, but must be at most {high}")


@dataclass(frozen=True)
class DeviceOptions(Checked):
    """Where and how to compute."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto",
        "of the computation; auto: bf16 on a GPU that has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class FileOptions(Checked):
    """Where to find a model, and whether a pickle may be read."""

    models_dir: list[str] = option(
        [],
        "a folder to find checkpoints in by name: of checkpoints, or a WebUI's or ComfyUI's root; repeat it for "
        "several (SALUN_MODELS_DIR adds more)",
        path=True,
    )
    allow_pickle: bool = option(
        False, "read a .ckpt: a pickle, unpacked with weights_only and kept as safetensors in the cache"
    )

    def __post_init__(self) -> None:
        if isinstance(self.models_dir, str):  # from Python one text is as good as a list of one
            object.__setattr__(self, "models_dir", [self.models_dir])
        super().__post_init__()


def from_mapping(kind: type, values: Any, where: str) -> Any:
    """A dataclass from untrusted data. where: names their source in errors; "" if it needs no name.

    Raises ConfigError for unknown keys (with the nearest name), wrong types and values out of range.
    """
    import difflib

    prefix = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix}expected names and values, got {type(values).__name__}")
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            shown = str(key)[:80]
            near = difflib.get_close_matches(shown, known, 1)
            raise ConfigError(f"{prefix}unknown option {shown!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = str(known[key].type)
        if not _fits(value, wanted):
            raise ConfigError(f"{prefix}{key} is {_shown(value)}, but must be {wanted.replace(' | None', '')}")
    numbers = {key for key in values if str(known[key].type).startswith("int")}
    made = {key: int(v) if key in numbers and v is not None else v for key, v in values.items()}
    try:
        return kind(**made)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _fits(value: Any, wanted: str) -> bool:
    """Whether a value is of the type that a dataclass's field names."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = -(2**63) <= value < 2**63
    else:
        number = isinstance(value, float) and not math.isnan(value)
    return (
        (value is None and "None" in wanted)
        or (wanted.startswith("int") and number and math.isfinite(value) and value == int(value))
        or (wanted.startswith("float") and number)
        or (wanted.startswith("str") and isinstance(value, str))
        or (wanted == "bool" and isinstance(value, bool))
        or (wanted.startswith("list") and isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def _shown(value: Any) -> str:
    """A value as a message can hold it; Python prints no whole number of more than 4,300 digits."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a very large number"
