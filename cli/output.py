"""Options that many commands have, and how these tell what they found: lines for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.errors import ConfigError
from salun.user_text import unquoted

from .progress import printable


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
    from salun.diffusion.finding import aliases

    return str(aliases()["default"])


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
        typer.echo(json.dumps(data, ensure_ascii=False))
    else:
        for line in lines:
            typer.echo(printable(line))


def bars(blocks: dict[str, list[int]], width: int = 40) -> list[str]:
    """A line of text with a bar for each block."""
    widest = max(map(len, blocks))
    lines = []
    for block, (some, total) in blocks.items():
        share = some / total if total else 0.0
        bar = "█" * round(share * width)
        lines.append(f"  {block:<{widest}}  {bar:<{width}}  {share:6.1%} of {total:,}")
    return lines
