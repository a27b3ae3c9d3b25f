"""`python -m salun`: the command line, installed (`salun_cli`) or in a bare clone (`cli/`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Find the command line and run it."""
    if importlib.util.find_spec("salun_cli") is None:
        folder = Path(__file__).resolve().parents[1] / "cli"
        spec = importlib.util.spec_from_file_location(
            "salun_cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            sys.exit("salun: the command line is not here: pip install salun")
        module = importlib.util.module_from_spec(spec)
        sys.modules["salun_cli"] = module
        spec.loader.exec_module(module)
    importlib.import_module("salun_cli.main").main()


if __name__ == "__main__":
    main()
