"""The Typer application that every command joins, and the options of all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from salun.version import __version__

app = typer.Typer(
    name="salun",
    help="Make a Stable Diffusion model forget a concept: only its salient weights are trained, the rest stays.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and stop")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show a traceback with an error")] = False,
) -> None:
    """Options of every command; `--debug` is read in `main`."""
