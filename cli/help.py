"""The help of the command line: examples of every command, groups of commands, and switches by their plain names."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

ERASE, LOOK, CLASSIFIERS = "Erase a concept", "Models, concepts and files", "Image classifiers"

PANELS = {
    ERASE: ("erase", "sample", "eval", "attack", "compare", "mask", "delta", "train", "ui"),
    LOOK: ("inspect", "models", "concepts", "methods", "cache", "doctor"),
    CLASSIFIERS: ("classify-train", "classify-unlearn", "classify-compare", "classify-eval"),
}
"""Title → the commands under it, in the order of the help."""

EXAMPLES = {
    "": (
        "salun erase --concept circle",
        "salun erase --model sd15 --concept nudity --dry-run",
        "salun ui --browser",
    ),
    "erase": (
        "salun erase --concept circle --anchor square",
        "salun erase --model a.safetensors --concept hokusai --output b.safetensors",
        "salun erase --model sdxl --concept nudity --low-vram --dry-run",
        "salun erase --resume --run-dir runs/my-run",
    ),
    "mask": (
        "salun mask --concept circle --density 0.1 --output circle.safetensors",
        "salun erase --concept circle --mask circle.safetensors",
    ),
    "sample": (
        "salun sample --prompt 'one red circle' --prompt 'one blue star'",
        "salun sample --model sd15 --prompt 'a church' -n 2 --output church.png",
        "salun sample --prompt 'a circle' --delta a.salun.safetensors --strength 0.5",
    ),
    "eval": (
        "salun eval runs/my-run -n 200",
        "salun eval b.safetensors --against a.safetensors --concept hokusai",
    ),
    "attack": (
        "salun attack runs/my-run --attack seeds --attack concept-vector",
        "salun attack b.safetensors --against a.safetensors --concept hokusai",
    ),
    "compare": (
        "salun compare --concept circle --methods salun --methods esd",
        "salun compare --resume --run-dir runs/my-comparison",
    ),
    "train": (
        "salun train --data digits --steps 2000",
        "salun train --data digits --without 3 --run-dir runs/no-3",
    ),
    "inspect": (
        "salun inspect runs/my-run",
        "salun inspect my.safetensors",
        "salun inspect runs/my-run --against runs/another",
    ),
    "concepts": ("salun concepts", "salun concepts --model shapes"),
    "models": ("salun models", "salun models --json"),
    "methods": ("salun methods", "salun methods --json"),
    "doctor": ("salun doctor", "salun doctor --offline"),
    "cache": ("salun cache", "salun cache --clear"),
    "ui": ("salun ui --browser", "salun ui --data my-jobs --models-dir ~/ComfyUI"),
    "classify-train": (
        "salun classify-train --data digits",
        "salun classify-train --data digits --run-dir runs/original --dry-run",
    ),
    "classify-unlearn": (
        "salun classify-unlearn --data digits --forget class:3",
        "salun classify-unlearn --original original.safetensors --method ga",
        "salun classify-unlearn --resume --run-dir runs/my-run",
    ),
    "classify-compare": (
        "salun classify-compare --data clutter --forget class:ring --seeds 3",
        "salun classify-compare --resume --run-dir runs/my-comparison",
    ),
    "classify-eval": ("salun classify-eval runs/my-run", "salun classify-eval runs/my-run --json"),
    "delta": (
        "salun delta extract shapes runs/my-run/model --output d.salun.safetensors",
        "salun delta apply shapes d.salun.safetensors --output half/ --strength 0.5",
    ),
    "delta extract": ("salun delta extract shapes runs/my-run/model --output d.salun.safetensors",),
    "delta apply": (
        "salun delta apply shapes d.salun.safetensors --output erased/",
        "salun delta apply shapes d.salun.safetensors --output half/ --strength 0.5",
    ),
    "delta stack": (
        "salun delta stack shapes a.salun.safetensors b.salun.safetensors --output c/",
        "salun delta stack shapes a.salun.safetensors --output c/ --strength 0.5",
    ),
    "delta undo": ("salun delta undo erased/ d.salun.safetensors --output restored/",),
    "delta export": (
        "salun delta export a.salun.safetensors --base sd15 --output a.lora.safetensors",
        "salun delta export a.salun.safetensors --base sd15 --output a.diff.safetensors",
    ),
    "delta inspect": ("salun delta inspect d.salun.safetensors",),
}
"""Command ("" for `salun` itself) → command lines that work where the files in them exist."""


class _WithExamples:
    """A command or group whose help ends with examples, and names a switch that is off by default without its opposite.

    The parser still knows all names.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        flags = [p for p in self.get_params(ctx) if getattr(p, "is_flag", False)]  # type: ignore[attr-defined]
        before = [(p.metavar, p.secondary_opts, p.show_default) for p in flags]
        for p in flags:
            p.metavar, off = "", p.default is False
            p.secondary_opts, p.show_default = ([], False) if off else (p.secondary_opts, p.show_default)
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        finally:
            for p, (metavar, opposite, shown) in zip(flags, before, strict=True):
                p.metavar, p.secondary_opts, p.show_default = metavar, opposite, shown
        name = ctx.command_path.partition(" ")[2]
        typer.echo("\n".join([" Examples:", *(f"  {line}" for line in EXAMPLES[name]), ""]))


class Command(_WithExamples, TyperCommand):
    """A command with examples."""


class Group(_WithExamples, TyperGroup):
    """A group of commands with examples."""


def complete_help(app: typer.Typer, delta: typer.Typer) -> None:
    """Give every command its examples, its panel and its place. delta: the group of that name, in the app."""
    order = [name for names in PANELS.values() for name in names]
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    for command in (*app.registered_commands, *delta.registered_commands):
        command.cls = Command
    for command in app.registered_commands:
        command.rich_help_panel = panel_of[_name(command)]
    app.registered_commands.sort(key=lambda command: order.index(_name(command)))
    for group in app.registered_groups:
        group.rich_help_panel = panel_of["delta"]
    app.info.cls = delta.info.cls = Group


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__)
