"""Typer options made from the core's option dataclasses: names, defaults, help and ranges cannot drift apart."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from salun.diffusion.options import GROUPS, Recipe

_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def with_options(
    kind: type,
    parameter: str = "options",
    skip: tuple[str, ...] = (),
    groups: Mapping[str, tuple[str, ...]] = GROUPS,
) -> Callable[[Any], Any]:
    """A decorator: replaces the command's parameter `options` by one CLI option per field of the dataclass `kind`.

    groups: title → the names under it, in the order in which help shows them. A command that has a parameter `given`
    gets the names of the options that stand on the command line.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        order = [name for names in groups.values() for name in names]
        fields = [item for item in dataclasses.fields(kind) if item.name not in skip]
        fields.sort(key=lambda item: order.index(item.name))
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name not in (parameter, "given")]

        def call(ctx: typer.Context, **values: Any) -> Any:
            chosen = {item.name: values.pop(item.name) for item in fields}
            chosen = {name: list(v) if isinstance(v, list | tuple) else v for name, v in chosen.items()}
            if "given" in signature.parameters:
                values["given"] = {name for name in chosen if _is_given(ctx, name)}
            return command(**values, **{parameter: kind(**chosen)})

        made = [
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=_annotation(item, groups)
            )
            for item in fields
        ]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        call.__signature__ = signature.replace(parameters=[context, *keyword, *made])  # type: ignore[attr-defined]
        call.__doc__ = command.__doc__
        call.__name__ = command.__name__
        return call

    return decorate


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default is not dataclasses.MISSING else []


def _annotation(item: dataclasses.Field[Any], groups: Mapping[str, tuple[str, ...]]) -> Any:
    declared = str(item.type)
    rules = item.metadata
    text = rules["help"]
    if rules["choices"]:
        text += f" ({', '.join(rules['choices'])})"
    shown: dict[str, Any] = {"show_default": False} if _default(item) in (None, []) else {}
    if groups is GROUPS and item.name in {own.name for own in dataclasses.fields(Recipe)}:
        text += " (default: the model's recipe)"
    annotation: Any = _TYPES[declared.removesuffix(" | None")] if not declared.startswith("list") else list[str]
    if declared.endswith(" | None"):
        annotation = annotation | None
    shown["rich_help_panel"] = next(title for title, names in groups.items() if item.name in names)
    return Annotated[annotation, typer.Option(help=text, **shown)]
