"""`salun methods`: the unlearning methods there are."""

from __future__ import annotations

from .app import app
from .output import Json, tell


@app.command()
def methods(as_json: Json = False) -> None:
    """List the unlearning methods of `salun erase`."""
    from dataclasses import fields

    from salun.methods import DIFFUSION

    listed = [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "mask": method.mask,
            "options": [item.name for item in fields(method.options_class)] if method.options_class else [],
        }
        for method in DIFFUSION.values()
    ]
    width = max(len(method.name) for method in DIFFUSION.values())
    lines = [f"{method.name:<{width}}  {method.title}: {method.paper}" for method in DIFFUSION.values()]
    tell(listed, as_json, lines)
