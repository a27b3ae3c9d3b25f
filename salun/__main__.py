"""`python -m salun`: the command line of this very copy, a clone's `cli/` or the installed `salun_cli`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Find the command line and run it."""
    clone = Path(__file__).resolve().parents[1]
    # a clone's own first: the core of one copy must not meet the command line of another that is installed as well
    if (clone / "pyproject.toml").is_file() and (clone / "cli" / "main.py").is_file():
        folder = clone / "cli"
        spec = importlib.util.spec_from_file_location(
            "salun_cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            sys.exit(f"salun: {folder} cannot be loaded: clone the repository again")
        module = importlib.util.module_from_spec(spec)
        sys.modules["salun_cli"] = module
        spec.loader.exec_module(module)
    elif importlib.util.find_spec("salun_cli") is None:
        sys.exit("salun: the command line is not installed: run pip install . in a clone of the repository")
    importlib.import_module("salun_cli.start").main()


if __name__ == "__main__":
    main()
