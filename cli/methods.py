"""`salun methods`: lists the unlearning methods and the attacks."""

from __future__ import annotations

from typing import Any

from .app import app
from .output import Json, entry, print_result


@app.command()
def methods(as_json: Json = False) -> None:
    """List the unlearning methods of `erase` and `classify-unlearn`, and the attacks of `attack`."""
    from dataclasses import fields

    from salun.attacks import ATTACKS
    from salun.methods import METHODS

    listed: dict[str, Any] = {
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
        lines.append(f"{task}:")
        for method in registry.values():
            lines += entry(method.name, f"{method.title} ({method.paper})", width)
    attacks = ATTACKS["diffusion"].values()
    listed["attacks"] = [
        {
            "name": attack.name,
            "title": attack.title,
            "paper": attack.paper,
            "options": {item.name: item.default for item in fields(attack.options)},
        }
        for attack in attacks
    ]
    lines.append("attacks, with their options and defaults:")
    width = max(len(attack.name) for attack in attacks)
    for attack in attacks:
        numbers = ", ".join(
            f"{item.name} {'auto' if item.default is None else item.default}" for item in fields(attack.options)
        )
        lines += entry(attack.name, f"{attack.title} ({attack.paper})" + (f": {numbers}" if numbers else ""), width)
    print_result(listed, as_json, lines)
