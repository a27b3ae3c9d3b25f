"""Options that many commands have, and how these tell what they found: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.display import printable
from salun.errors import ConfigError
from salun.user_text import unquoted


def path_given(given: Any) -> Any:
    """A path of the command line, or several, without quotes around them."""
    if isinstance(given, list | tuple):
        return [path_given(each) for each in given]
    return given if given is None else type(given)(unquoted(str(given)))


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        callback=path_given,
        help="alias (see `salun models`), .safetensors file, diffusers folder, hub id, or a checkpoint's name in "
        "--models-dir (default: the small one that comes along)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else there")]
Force = Annotated[bool, typer.Option("--force", help="overwrite files that are there already")]


def model_or_default(name: str | None) -> str:
    """The model named, or the small one that comes along."""
    if name is not None:
        return name
    from salun.checkpoints.locate import aliases

    return str(aliases()["default"])


@contextmanager
def default_model_named(name: str | None) -> Iterator[None]:
    """Within, a concept that the default model does not know says that it is the default, where none was named."""
    from salun.diffusion.prompts.vocabulary import UnknownConcept

    try:
        yield
    except UnknownConcept as error:
        if name is not None:
            raise
        raise UnknownConcept(
            f"{error}. No --model is given, so the small demo model is used: name another by --model"
        ) from error


def new_file(path: Path, force: bool, ending: str) -> None:
    """Raises ConfigError for an output of another ending, or one that is there and may not be replaced."""
    if path.suffix != ending:
        raise ConfigError(f"--output {path}: end it in {ending}")
    if path.exists() and not force:
        raise ConfigError(f"--output {path} is there already: choose another name, or add --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def tell(data: Any, as_json: bool, lines: list[str]) -> None:
    """Print the data as one JSON object, or else the lines."""
    if as_json:
        text = json.dumps(data, ensure_ascii=False)  # untrusted text may hold what a terminal would obey
        typer.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
    else:
        for line in lines:
            typer.echo(printable(line))


def duration(seconds: float) -> str:
    """A time in words, in its two largest units: 40 s, 12 min, 3 hours 20 min, 2 days 4 hours."""
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


def _counted(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


def bars(blocks: dict[str, list[int]], width: int = 40) -> list[str]:
    """A line of text with a bar for each block."""
    widest = max(map(len, blocks))
    lines = []
    for block, (some, total) in blocks.items():
        share = some / total if total else 0.0
        bar = "█" * round(share * width)
        lines.append(f"  {block:<{widest}}  {bar:<{width}}  {share:6.1%} of {total:,}")
    return lines
