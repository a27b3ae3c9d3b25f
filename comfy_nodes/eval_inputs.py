"""The options of an evaluation as inputs of SalUn Evaluate. Files and folders have the names of ComfyUI's lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from salun.detectors import without_path
from salun.diffusion.eval_options import GROUPS, EvalOptions
from salun.diffusion.options import EraseOptions
from salun.diffusion.prompts.prompt_file import LINES, TABLES
from salun.errors import ConfigError
from salun.image_metrics import IMAGE_METRICS
from salun.options import entry_of
from salun.user_text import is_data_set_id, is_hub_id

from .inputs import DETECTORS, explicit, option_input
from .paths import file_state, input_folder, saved_path
from .types import OptionValues

WIRED = ("concept", "against")  # the inputs concept and before
OTHERWISE = (*(item.name for item in dataclasses.fields(EraseOptions)), *WIRED)  # SalUn Options, or the graph
MAIN = ("detector", "n", "seed")  # always in view
PROMPTS = (*TABLES, LINES)  # endings of files
INPUTS = {"clip": "clip_model"}  # option → its input, where a wire has its name
_TOOLTIPS = {  # where the command line takes a path
    "detector": f"Detectors that decide whether images show the concept, one per line ({DETECTORS}, or "
    "images:NAME for a folder in input with the folders concept and other) (default: that of SalUn Options, else self: "
    "the original model as classifier)",
    "metric": f"Further metrics of the images, one per line ({', '.join(IMAGE_METRICS)}); fid, kid and cmmd compare "
    "the two models, or each with real images, as in fid:NAME for a folder in input",
    "clip": "Hub id (owner/name) of the CLIP model of detectors and metrics by CLIP (default: openai's ViT-L/14)",
    "prompts": "Further prompts, one file per line: in input or output/salun (.csv with the columns of I2P or COCO, "
    "or .txt), or hub id of a data set",
    "keep_images": "Write every image, and eval.json, eval.csv and eval.html, into output/salun",
}


def eval_inputs(main: bool) -> dict[str, Any]:
    """INPUT_TYPES entries of the options in view, or else of the others."""
    names = [name for names in GROUPS.values() for name in names]
    shown = [name for name in names if (name in MAIN) == main and (name in MAIN or name not in OTHERWISE)]
    return {INPUTS.get(name, name): _input(name, {} if main else {"advanced": True}) for name in shown}


def _input(name: str, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    what, settings = option_input(name, EvalOptions)
    return what, {**settings, "tooltip": _TOOLTIPS.get(name, settings["tooltip"]), **more}


def eval_options(values: OptionValues) -> tuple[EvalOptions, dict[str, str]]:
    """The core's options from the node's inputs, and of detectors and metrics their names as they were given.

    Raises:
        ConfigError: An option is invalid, or names a file that ComfyUI does not list.
    """
    option_of = {shown: option for option, shown in INPUTS.items()}
    given = explicit({option_of.get(name, name): value for name, value in values.items()}, EvalOptions)
    named: dict[str, str] = {}
    for name, look_up in _LOOKED_UP.items():
        if isinstance(texts := given.get(name), list):
            given[name] = [look_up(text) for text in texts]
            named.update(zip(given[name], texts, strict=True))
        elif texts is not None:
            given[name] = look_up(texts)
    return EvalOptions(**given), named


def _detector(name: str) -> str:
    key, _, folder = name.partition(":")
    return f"images:{input_folder(folder, 'detector')}" if key == "images" else without_path(name)


def _metric(name: str) -> str:
    _, folder = entry_of(name, IMAGE_METRICS, "metric")
    return f"{name.partition(':')[0]}:{input_folder(folder, 'metric')}" if folder else name


def _prompts(name: str) -> str:
    return name if is_data_set_id(name) else str(saved_path(name, PROMPTS))


def _clip(name: str) -> str:
    if not is_hub_id(name):
        raise ConfigError(f"is {name[:80]!r}, but must be a hub id (owner/name)", option=INPUTS["clip"])
    return name


_LOOKED_UP: dict[str, Callable[[str], str]] = {
    "detector": _detector,
    "metric": _metric,
    "prompts": _prompts,
    "clip": _clip,
}


def prompts_state(prompts: str) -> str:
    """A text that changes with the files of prompts, for ComfyUI's cache."""
    names = [line.strip() for line in prompts.splitlines()]
    return "\n".join(file_state(name, PROMPTS) for name in names if name and not is_data_set_id(name))
