"""Typer options made from the core's option dataclasses, with their names, defaults, help texts and ranges."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from salun.diffusion.options import GROUPS, OF_RECIPE, Recipe
from salun.options import option_types

_METAVARS = {str: "TEXT", list: "TEXT", int: "INTEGER", float: "NUMBER"}


def with_options(
    kind: type,
    parameter: str = "options",
    skip: tuple[str, ...] = (),
    groups: Mapping[str, tuple[str, ...]] = GROUPS,
) -> Callable[[Any], Any]:
    """A decorator that replaces a parameter of a command by one CLI option per field of a dataclass.

    A command with a parameter `given` gets the names of the options that are on the command line.

    Args:
        kind: The option dataclass.
        parameter: Name of the parameter that gets its instance.
        skip: Fields without a CLI option.
        groups: Panel title → the options in it, in the order of the help. Expert options have a panel of their own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        order = [name for names in groups.values() for name in names]
        fields = [item for item in dataclasses.fields(kind) if item.name not in skip]
        fields.sort(key=lambda item: (item.metadata["expert"], order.index(item.name)))
        signature = inspect.signature(command, eval_str=True)
        unchanged = [p for p in signature.parameters.values() if p.name not in (parameter, "given")]

        def call(ctx: typer.Context, **values: Any) -> Any:
            chosen = {item.name: values.pop(item.name) for item in fields}
            chosen = {name: list(v) if isinstance(v, list | tuple) else v for name, v in chosen.items()}
            if "given" in signature.parameters:
                values["given"] = {name for name in chosen if _is_given(ctx, name)}
            return command(**values, **{parameter: kind(**chosen)})

        made = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(item),
                annotation=_annotation(item, *option_types(kind)[item.name], groups),
            )
            for item in fields
        ]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in unchanged]
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


def _annotation(item: dataclasses.Field[Any], kind: type, optional: bool, groups: Mapping[str, tuple[str, ...]]) -> Any:
    rules, unset = item.metadata, item.metadata["auto"]
    text = rules["text"] + (f" ({', '.join(rules['choices'])})" if rules["choices"] else "")
    if groups is GROUPS and item.name in {each.name for each in dataclasses.fields(Recipe)}:
        unset = unset or OF_RECIPE
    text += f" (default: {unset})" if unset else ""
    panel = "Expert" if rules["expert"] else next(title for title, names in groups.items() if item.name in names)
    annotation: Any = list[str] if kind is list else kind
    if optional:
        annotation = annotation | None
    shown = _default(item) not in (None, [])
    names = [f"-{item.name}"] if len(item.name) == 1 else []
    return Annotated[
        annotation,
        typer.Option(*names, help=text, show_default=shown, rich_help_panel=panel, metavar=_METAVARS.get(kind)),
    ]
