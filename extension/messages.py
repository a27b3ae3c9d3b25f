"""Errors as JSON, from a job's process to the page, and as messages on the page."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from salun.display import LABELS as STAGES
from salun.errors import SalunError, describe

from .limits import truncated

FIELDS = ("message", "option", "advice", "code")
PAGE_ADVICE = {  # code of an error → advice on the page
    "in-use": "Wait until it is done",
    "exists": "Choose another name",
    "no-space": "Make room on that disk",
    "not-found": "Choose one from the list",
    "other-options": "Start a new job",
    "other-model-mask": "Make a mask with “Only make the mask”",
    "resume-to-write": "The training is saved: correct the cause, then press Resume",
    "pickle": "Choose a .safetensors file of the same model",
    "deltas-applied": "Choose all deltas at once under Deltas",
    "wrong-base": "Choose the checkpoint that the delta was made from",
}
LABELS = {"lr": "learning rate", "clip_skip": "CLIP skip", "low_vram": "low VRAM", "retain_weight": "retain weight (α)",
          "lr_decay": "learning rate decay", "keep_ema": "keep EMA", "run_dir": "run folder",
          "output": "new file", "n": "images of each set", "against": "its original", "clip": "CLIP model",
          "metric": "metric of images", "prompts": "files of prompts", "sets": "sets of prompts"}  # fmt: skip


def label(option: str) -> str:
    """An option's name on the page."""
    return LABELS.get(option, option.replace("_", " "))


def stage_label(stage: str) -> str:
    """A stage's name on the page, that of the command line; “starting” for "", before the first stage."""
    return next((text.lower() for known, text in STAGES.items() if known == stage), stage) or "starting"


def to_fields(error: SalunError) -> dict[str, str | None]:
    """An error as a dictionary for JSON; long texts are truncated."""
    values = {name: getattr(error, name) for name in FIELDS}
    return {name: truncated(value) if value is not None else None for name, value in values.items()}


def from_fields(fields: Any) -> SalunError:
    """The error of these fields, which may be untrusted input. Raises ValueError if they are invalid."""
    if not isinstance(fields, Mapping) or set(fields) != set(FIELDS):
        raise ValueError(f"an error has the fields {', '.join(FIELDS)}")
    if not all(isinstance(value, str) or (value is None and name == "option") for name, value in fields.items()):
        raise ValueError("an error's fields are text")
    for _, option, specification, conversion in string.Formatter().parse(fields["advice"]):
        if option is not None and (specification or conversion or not option.isidentifier()):
            raise ValueError("an error's advice has something other than option names in braces")
    message, advice, code = (truncated(fields[name]) for name in ("message", "advice", "code"))
    return SalunError(message, option=fields["option"], advice=advice, code=code)


def render(error: SalunError, spell: Callable[[str], str] = label) -> str:
    """An error as a message, with the page's advice. spell: option name → its spelling."""
    return truncated(describe(error, spell, PAGE_ADVICE))
