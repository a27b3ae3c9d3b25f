"""`python path/to/extension FOLDER`: the child process of a job, whatever the path of the extension's folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "salun_webui_extension"


def _open() -> None:
    home = Path(__file__).resolve().parent
    sys.path[:] = [
        path for path in sys.path if Path(path or ".").resolve() != home
    ]  # its modules must not be imported by name
    spec = importlib.util.spec_from_file_location(NAME, home / "__init__.py", submodule_search_locations=[str(home)])
    if spec is None or spec.loader is None:
        sys.exit(f"salun: {home} cannot be loaded: clone the repository again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    importlib.import_module(f"{NAME}.child").main()


if __name__ == "__main__":
    _open()
