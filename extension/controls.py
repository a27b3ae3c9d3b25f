"""Controls made from the core's option dataclasses, and values read back from them: neither can drift from the core."""

from __future__ import annotations

import dataclasses
from typing import Any

from salun.diffusion.options import GROUPS, EraseJob, Recipe
from salun.errors import ConfigError
from salun.options import MASKS

from .service import OFFERED

FIRST = ("model", "concept", "anchor", "retain_prompts")  # stand on the page by themselves
FIELDS = {item.name: item for item in dataclasses.fields(EraseJob) if item.name in OFFERED}
ADVANCED = {
    title: tuple(name for name in names if name in FIELDS and name not in FIRST) for title, names in GROUPS.items()
}
AUTO = "auto"
LONGEST_NUMBER = 30  # characters
HERE = {  # where the command line takes a path: no path is taken here, and what can be chosen is listed
    "components": "for single files: an alias or a hub id (owner/name) that has what the file lacks "
                  "(VAE, text encoder, configs)",
    "forget_images": "a folder of pictures of the concept, in place of samples: one of those in the data folder's "
                     "`pictures` (several concepts: a folder in it for each)",
    "retain_images": "a folder of pictures to keep, added to the samples: one of those in the data folder's "
                     "`pictures`; x.txt beside x.png says what it shows",
    "mask": "saliency, shuffled, random, full (the controls), or the mask of an earlier run or job",
}  # fmt: skip
FOLDERS = ("forget_images", "retain_images")
LABELS = {"lr": "learning rate", "clip_skip": "CLIP skip", "low_vram": "low VRAM", "retain_weight": "retain weight (α)",
          "lr_decay": "learning rate decay", "keep_ema": "keep EMA"}  # fmt: skip


def label(name: str) -> str:
    """An option's name for people."""
    return LABELS.get(name, name.replace("_", " "))


def help_of(name: str) -> str:
    """An option's help, as the command line shows it where it takes the same."""
    own = {field.name for field in dataclasses.fields(Recipe)}
    return HERE.get(name, str(FIELDS[name].metadata["help"])) + (" (auto: the model's recipe)" if name in own else "")


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
    """The gradio component of an option, at its default. masks, folders: names of what can be chosen beside it."""
    item, shown = FIELDS[name], {"label": label(name), "info": help_of(name), "elem_id": f"salun_{name}"}
    if str(item.type) == "bool":
        return gr.Checkbox(value=default_of(name), **shown)
    if name == "mask":
        return gr.Dropdown(choices=[*MASKS, *masks], value=default_of(name), **shown)
    if name in FOLDERS:
        return gr.Dropdown(choices=["", *folders], value=default_of(name), **shown)
    if item.metadata["choices"]:
        choices = list(item.metadata["choices"])
        return gr.Dropdown(
            choices=choices if item.default in choices else [AUTO, *choices], value=default_of(name), **shown
        )
    if str(item.type).startswith("list"):
        return gr.Textbox(value=default_of(name), lines=2, placeholder="one a line", **shown)
    return gr.Textbox(value=default_of(name), max_lines=1, placeholder=AUTO, **shown)


def value_of(name: str, shown: Any) -> Any:
    """An option's value from what its control holds; None for auto. Raises ConfigError for a number that is none."""
    item = FIELDS[name]
    kind = str(item.type)
    if kind == "bool":
        return bool(shown)
    text = str(shown if shown is not None else "").strip()
    if kind.startswith("list"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    if text in ("", AUTO) and ("None" in kind or text == ""):
        return None
    if len(text) > LONGEST_NUMBER and kind.startswith(("int", "float")):
        raise ConfigError(f"{label(name)} has {len(text)} digits: give a number")
    try:
        if kind.startswith("int"):
            return int(text)
        return float(text) if kind.startswith("float") else text
    except ValueError:
        raise ConfigError(f"{label(name)} is {text[:40]!r}: give a number") from None


def shown_of(name: str, value: Any) -> Any:
    """What the control of an option shows for a value."""
    if value is None:
        return AUTO if FIELDS[name].metadata["choices"] else ""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, bool | str) else _text(value)


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)
