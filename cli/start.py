"""Entry point of the command `salun`: handles Ctrl-C and closed standard streams before anything else is imported."""

from __future__ import annotations

import os
import sys

from . import interrupt


def main() -> None:
    """Run the command line."""
    interrupt.install()
    _open_streams()
    from .main import main as run

    run()


def _open_streams() -> None:
    """Open the null device as closed standard streams: the next opened file would otherwise get their numbers, and
    messages of libraries would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (kept until the end)
