"""`salun methods`: lists the unlearning methods."""

from __future__ import annotations

from .app import app
from .output import Json, print_result


@app.command()
def methods(as_json: Json = False) -> None:
    """List the unlearning methods of `erase` and `classify-unlearn`."""
    from dataclasses import fields

    from salun.methods import METHODS

    listed = {
        task: [
            {
                "name": method.name,
                "title": method.title,
                "paper": method.paper,
                "mask": method.mask,
                "options": [item.name for item in fields(method.options)],
            }
            for method in registry.values()
        ]
        for task, registry in METHODS.items()
    }
    lines = []
    for task, registry in METHODS.items():
        width = max(map(len, registry))
        lines += [f"{task}:", *(f"  {m.name:<{width}}  {m.title} ({m.paper})" for m in registry.values())]
    print_result(listed, as_json, lines)
