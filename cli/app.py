"""The Typer application that every command joins, and the options of all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from salun.version import __version__

app = typer.Typer(
    name="salun",
    help="Erase a concept from a Stable Diffusion model or an image classifier by training its salient weights only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error")] = False,
) -> None:
    """Options of every command; `--debug` is read in `main`."""
