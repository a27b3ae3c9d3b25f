"""`salun`: the command line. Commands import heavy packages when they run, so that --help is fast."""

from __future__ import annotations

import io
import os
import shlex
import sys
from contextlib import suppress
from typing import Any

import typer

from salun.display import printable
from salun.errors import Cancelled, ConfigError, SalunError, describe, literal

from . import erase, interrupt, look  # noqa: F401  (their commands join the app, and its help shows them in this order)

# isort: split
from . import attack, classify, compare, delta, methods, train, ui  # noqa: F401
from .app import app
from .help import complete_help
from .output import flag, shortened

app.add_typer(delta.app, name="delta")
complete_help(app, delta.app)

NAMED = {"concept": "To name a concept", "prompt": "To give a prompt"}  # options that people forget to write
ClickException: Any = typer.BadParameter.__mro__[2]  # Typer brings click under its own name or under click's


def main() -> None:
    """Run the CLI. Exit codes: 0 done, 1 error, 2 usage error, 130 interrupted. An error is one line on stderr."""
    interrupt.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows is not UTF-8 by itself
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name="salun")
        sys.stdout.flush()
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        line = (isinstance(error, Cancelled) and error.line) or interrupt.LINE
        if interrupt.stopping():
            interrupt.leave(printable(line))
        if isinstance(error, Cancelled | typer.Abort):
            _complain(line)
            sys.exit(interrupt.CODE)
        if isinstance(error, BrokenPipeError):  # the reader of stdout has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        text, code = _message(error)
        if text is None or ("--debug" in sys.argv[1:] and not isinstance(error, ClickException)):
            raise
        if text:  # empty where the help was printed instead
            _complain(text)
    sys.exit(code or 0)


def _message(error: Exception) -> tuple[str | None, int]:
    """The line that describes an error, None for an unexpected one, and the exit code."""
    if isinstance(error, SalunError):
        return describe(error, flag, _advice(error)), 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, ClickException):
        return _usage(error), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", 1
    from salun.compute.device import is_out_of_memory

    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return "out of memory. Try --dtype bf16, --low-vram, a smaller --resolution or --batch-size", 1
    return None, 1


def _advice(error: SalunError) -> dict[str, str]:
    """Code → advice of the command line's own: which command lists what there is."""
    from salun.diffusion.prompts.vocabulary import UnknownConcept

    if not isinstance(error, UnknownConcept):
        return {}
    command = literal(shlex.join(["salun", "concepts", "--model", error.model]))
    return {error.code: f"`{command}` lists all" + (f". {error.advice}" if error.advice else "")}


def _usage(error: Any) -> str:
    """The line for a wrong command line."""
    text: str = error.format_message()
    context = getattr(error, "ctx", None)
    if context is not None and text.startswith(("Got unexpected extra argument", "Missing option")):
        missing = next((name for name in NAMED if name in {p.name for p in context.command.params}), None)
        extra = " ".join(_extra_arguments(context))
        if missing is not None and extra:
            return f"unexpected argument {extra!r}. {NAMED[missing]}: --{missing} {shlex.quote(extra)}"
    return f"{text} (see `salun --help`)" if text else ""


def _extra_arguments(context: Any) -> list[str]:
    """The arguments that are not options of the command; click reports a missing option before them."""
    arguments = sys.argv[1:]
    arguments = arguments[arguments.index(context.info_name) + 1 :]
    _, extra, _ = context.command.make_parser(context).parse_args(arguments)
    return list(extra)


def _complain(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed
        typer.echo("salun: " + shortened(printable(" ".join(text.split()))), err=True)


if __name__ == "__main__":
    main()
