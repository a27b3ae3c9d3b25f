"""The page's controls, made from the core's option dataclasses, and the options read back from them."""

from __future__ import annotations

import dataclasses
from typing import Any

from salun.diffusion.options import GROUPS, EraseJob, Recipe
from salun.errors import ConfigError
from salun.options import MASKS

from .inputs import ERASE_FIELDS, IMAGE_FOLDERS
from .messages import label

MAIN_CONTROLS = ("model", "concept", "anchor", "retain_prompts")  # outside of “Advanced”
FIELDS = {item.name: item for item in dataclasses.fields(EraseJob) if item.name in ERASE_FIELDS}
ADVANCED = {
    title: tuple(name for name in names if name in FIELDS and name not in MAIN_CONTROLS)
    for title, names in GROUPS.items()
}
AUTO = "auto"
MAX_DIGITS = 30  # characters of a number
PAGE_HELP = {  # options that take a path on the command line, but only a name here
    "components": "Single files: alias or hub id (owner/name) with the parts that the file lacks "
                  "(VAE, text encoder, configs).",
    "forget_images": "Folder of images of the concept, used instead of samples: a folder in `pictures` of the data "
                     "folder (several concepts: a subfolder for each).",
    "retain_images": "Folder of images to retain, used in addition to samples: a folder in `pictures` of the data "
                     "folder; x.txt is the prompt of x.png.",
    "detector": "Decides whether images show the concept: attribute, self, clip, imagenet, safety-checker, nudenet, "
                "open-nsfw, or images:NAME for a folder in `pictures` with the folders concept and other.",
    "mask": "saliency, shuffled, random, full (the controls), or the mask of an earlier run or job.",
}  # fmt: skip


def help_of(name: str) -> str:
    """An option's help: that of the command line, except for options that take a path there."""
    of_recipe = {field.name for field in dataclasses.fields(Recipe)}
    shown = PAGE_HELP.get(name, str(FIELDS[name].metadata["help"]))
    return shown + (" (auto: the model's recipe)" if name in of_recipe else "")


def default_of(name: str) -> Any:
    """The default of an option as its control shows it."""
    item = FIELDS[name]
    value = item.default if item.default is not dataclasses.MISSING else []
    if isinstance(value, list):
        return "\n".join(value)
    if value is None:
        return AUTO if item.metadata["choices"] else ""
    return value if isinstance(value, bool | str) else _text(value)


def control(gr: Any, name: str, masks: list[str], folders: list[str]) -> Any:
    """The gradio component of an option, at its default. masks, folders: names of masks and image folders to choose."""
    item, shown = FIELDS[name], {"label": label(name), "info": help_of(name), "elem_id": f"salun_{name}"}
    if str(item.type) == "bool":
        return gr.Checkbox(value=default_of(name), **shown)
    if name == "mask":
        return gr.Dropdown(choices=[*MASKS, *masks], value=default_of(name), **shown)
    if name in IMAGE_FOLDERS:
        return gr.Dropdown(choices=["", *folders], value=default_of(name), **shown)
    if item.metadata["choices"]:
        choices = list(item.metadata["choices"])
        return gr.Dropdown(
            choices=choices if item.default in choices else [AUTO, *choices], value=default_of(name), **shown
        )
    if str(item.type).startswith("list"):
        return gr.Textbox(value=default_of(name), lines=2, placeholder="one per line", **shown)
    return gr.Textbox(value=default_of(name), max_lines=1, placeholder=AUTO, **shown)


def value_of(name: str, shown: Any) -> Any:
    """An option's value from what its control holds; None for auto. Raises ConfigError for an invalid number."""
    item = FIELDS[name]
    kind = str(item.type)
    if kind == "bool":
        return bool(shown)
    text = str(shown if shown is not None else "").strip()
    if kind.startswith("list"):
        return lines_of(text)
    if text in ("", AUTO) and ("None" in kind or text == ""):
        return None
    if len(text) > MAX_DIGITS and kind.startswith(("int", "float")):
        raise ConfigError(f"has {len(text)} digits; the limit is {MAX_DIGITS}", option=name)
    try:
        if kind.startswith("int"):
            return int(text)
        return float(text) if kind.startswith("float") else text
    except ValueError:
        raise ConfigError(f"is {text[:40]!r}, but must be a number", option=name) from None


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def shown_of(name: str, value: Any) -> Any:
    """What the control of an option shows for a value."""
    if value is None:
        return AUTO if FIELDS[name].metadata["choices"] else ""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, bool | str) else _text(value)


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)
