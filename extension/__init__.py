"""The WebUI tab "Erase concept" and the page of `salun ui`.

A WebUI has no salun on its path: the core next to this folder is loaded by its path, unless one is loaded already.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent


def _load_core() -> None:
    core = HOME.parent / "salun" / "__init__.py"
    loaded = sys.modules.get("salun")
    if loaded is not None:
        if core.is_file() and Path(loaded.__file__ or "").resolve() != core:
            logging.getLogger("salun").warning("%s is loaded already; %s is not used", loaded.__file__, core)
        return
    if not core.is_file():  # installed as a package: salun is on the path
        return
    spec = importlib.util.spec_from_file_location("salun", core, submodule_search_locations=[str(core.parent)])
    if spec is None or spec.loader is None:
        raise ImportError(f"salun: {core} cannot be loaded: clone the repository again")
    module = importlib.util.module_from_spec(spec)
    sys.modules["salun"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["salun"]  # a partly loaded core must not be imported again
        raise


_load_core()
