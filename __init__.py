"""ComfyUI's entry point: this clone, under any name in `custom_nodes/`, is the node pack.

ComfyUI does not put a pack's folder on sys.path, so the core is loaded by its path.
"""

import importlib.util
import logging
import sys
from pathlib import Path

WEB_DIRECTORY = "./comfy_nodes/web"  # help pages, served by ComfyUI
NODE_CLASS_MAPPINGS: dict = {}
NODE_DISPLAY_NAME_MAPPINGS: dict = {}


def _load_core() -> None:
    home = Path(__file__).resolve().parent / "salun" / "__init__.py"
    loaded = sys.modules.get("salun")
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve() != home:
            logging.warning("salun: %s is loaded already; %s is not used", loaded.__file__, home)
        return
    spec = importlib.util.spec_from_file_location("salun", home, submodule_search_locations=[str(home.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["salun"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["salun"]  # the next import must not find an incomplete core
        raise


if "comfy" in sys.modules or importlib.util.find_spec("comfy") is not None:
    _load_core()
    from .comfy_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
