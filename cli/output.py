"""Options of many commands, and the output of results: lines of text for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.display import columns, printable, wrapped
from salun.errors import ConfigError
from salun.user_text import unquoted


def unquoted_path(value: Any) -> Any:
    """A path of the command line, or several, without quotes around them."""
    if isinstance(value, list | tuple):
        return [unquoted_path(each) for each in value]
    return value if value is None else type(value)(unquoted(str(value)))


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        callback=unquoted_path,
        help="Model: an alias (`salun models`), a .safetensors file, a diffusers folder, a hub id, or the name of a "
        "checkpoint in the model folders (default: the bundled `shapes`)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a single JSON object to stdout")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files")]


def flag(name: str) -> str:
    """The name of an option as the command line spells it."""
    return f"-{name}" if len(name) == 1 else "--" + name.replace("_", "-")


def model_or_default(name: str | None) -> str:
    """The name of a model, by default that of the bundled one."""
    if name is not None:
        return name
    from salun.checkpoints.locate import aliases

    return str(aliases()["default"])


@contextmanager
def default_model_named(name: str | None) -> Iterator[None]:
    """Context manager: an unknown concept's error names the default model as a cause, where no model is given."""
    from salun.diffusion.prompts.vocabulary import UnknownConcept

    try:
        yield
    except UnknownConcept as error:
        if name is None:
            error.advice = "The bundled demo model is used because no {model} is given; name the model you want"
        raise


def new_file(path: Path, force: bool, ending: str) -> None:
    """Check the path of an output and make its folder. Raises ConfigError for another suffix or an existing file."""
    if path.suffix != ending:
        raise ConfigError(f"is {path}, but must end in {ending}", option="output")
    if path.exists() and not force:
        advice = "Choose another name, or add {force}"
        raise ConfigError(f"is {path}, which already exists", option="output", advice=advice, code="exists")
    path.parent.mkdir(parents=True, exist_ok=True)


def print_result(data: Any, as_json: bool, lines: list[str]) -> None:
    """Print the data as one JSON object, or else the lines."""
    if as_json:
        text = json.dumps(data, ensure_ascii=False)  # untrusted text may contain escape sequences
        typer.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
    else:
        for line in lines:
            typer.echo(shortened(printable(line)))


def sentences(lines: Sequence[str]) -> list[str]:
    """Lines of prose, wrapped where stdout is a terminal; elsewhere each is a line."""
    if not sys.stdout.isatty():
        return list(lines)
    return [part for line in lines for part in wrapped(line, columns())]


def entry(name: str, text: str, width: int) -> list[str]:
    """An entry of a list: its name, and next to it a text, which is wrapped where stdout is a terminal."""
    parts = wrapped(text, columns() - width - 4) if sys.stdout.isatty() else [text]
    return [f"  {label:<{width}}  {part}" for label, part in zip([name, *[""] * len(parts)], parts, strict=False)]


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Facts in two columns: hashes shortened, numbers grouped, what is not known left out."""
    rows = {_title(name): _fact(name, value) for name, value in facts.items() if value not in (None, "")}
    width = max(map(len, rows), default=0) + 1
    return [f"{title + ':':<{width}} {text}" for title, text in rows.items()]


def _title(name: str) -> str:
    return name.removeprefix("salun.").replace("_", " ").replace("unet", "UNet")


def _fact(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name != "seed":
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return shortened(str(value))


def shortened(text: str) -> str:
    """A text with every SHA-256 in it cut to 12 characters, except in paths."""
    return re.sub(r"(?<![\w/.-])([0-9a-f]{12})[0-9a-f]{52}(?![\w/-])", r"\1…", text)


def duration(seconds: float) -> str:
    """A time in its two largest units: 40 s, 12 min, 3 hours 20 min, 2 days 4 hours."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return _counted(hours, "hour") + (f" {minutes} min" if minutes else "")
    days, hours = divmod(round(seconds / 3600), 24)
    return _counted(days, "day") + (f" {_counted(hours, 'hour')}" if hours else "")


def duration_range(least: float, most: float) -> str:
    """Two times as people say it: about 12 min, 3 to 12 min, 50 s to 3 min."""
    ends = duration(least), duration(most)
    if ends[0] == ends[1] or most < 1.2 * least:
        return f"about {ends[1]}"
    numbers = [end.split(" ") for end in ends]
    if len(numbers[0]) == len(numbers[1]) == 2 and numbers[0][1] == numbers[1][1]:
        return f"{numbers[0][0]} to {ends[1]}"
    return f"{ends[0]} to {ends[1]}"


def _counted(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


def bars(blocks: dict[str, list[int]], width: int = 24) -> list[str]:
    """A line of text with a bar for each block."""
    widest = max(map(len, blocks))
    lines = []
    for block, (count, total) in blocks.items():
        fraction = count / total if total else 0.0
        bar = "█" * round(fraction * width)
        lines.append(f"  {block:<{widest}}  {bar:<{width}}  {fraction:6.1%} of {total:,}")
    return lines
