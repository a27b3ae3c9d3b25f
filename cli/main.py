"""`salun`: the command line. Heavy packages are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import io
import sys
from typing import Any

import typer

from salun.errors import Cancelled, ConfigError, SalunError

from . import erase, look  # noqa: F401  (their commands join the app, and its help shows them in this order)

# isort: split
from . import classify, delta, ui  # noqa: F401
from .app import app
from .progress import printable

app.add_typer(delta.app, name="delta")

ClickException: Any = typer.BadParameter.__mro__[2]  # Typer brings click under its own name or under click's


def main() -> None:
    """Run the CLI. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted. Errors are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows is not UTF-8 by itself
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name="salun")
    except typer.Exit as stop:
        code = stop.exit_code
    except (Cancelled, KeyboardInterrupt, typer.Abort) as stop:
        known = isinstance(stop, Cancelled) and "--resume" in str(stop)
        _complain(str(stop) if known else "stopped; no half-written file is left. Give the command again to start over")
        code = 130
    except SalunError as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(str(error))
        code = 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError) as error:
        from salun.device import is_out_of_memory

        if "--debug" in sys.argv[1:] or not is_out_of_memory(error):
            raise
        _complain("out of memory: free some, or try --dtype bf16, --low-vram, a smaller --resolution or --batch-size")
        code = 1
    except OSError as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
        code = 1
    except ClickException as error:
        text = error.format_message()
        if text:  # empty where the help was printed instead
            _complain(f"{text} (see `salun --help`)")
        code = 2
    sys.exit(code or 0)


def _complain(text: str) -> None:
    typer.echo("salun: " + printable(" ".join(text.split())), err=True)


if __name__ == "__main__":
    main()
