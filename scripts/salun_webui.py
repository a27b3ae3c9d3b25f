"""Entry point of A1111, Forge and reForge: loads the `extension` package under a name that no other extension uses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

_NAME = "salun_webui_extension"  # extensions share sys.modules, where `extension` could be another's

if _NAME not in sys.modules:  # "Reload UI" runs this file again, and a running job lives in the package
    _home = Path(__file__).resolve().parents[1] / "extension"
    _spec = importlib.util.spec_from_file_location(
        _NAME, _home / "__init__.py", submodule_search_locations=[str(_home)]
    )
    if _spec is None or _spec.loader is None:
        raise ImportError(f"salun: {_home} is missing: clone the repository again")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)

if "modules.script_callbacks" in sys.modules:  # a WebUI is loading us, not a test or an installer
    importlib.import_module(f"{_NAME}.webui").register()
    ErasedDelta = importlib.import_module(f"{_NAME}.webui_delta").ErasedDelta  # found here by its class
