"""The core's options as inputs of nodes: type, default, range and tooltip come from the dataclass.

An input has no empty state, so automatic (None in the core) is a number just outside the range, an empty text, or a
choice named "auto".
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from salun.detectors import WITHOUT_PATH, without_path
from salun.diffusion.options import GROUPS, EraseOptions
from salun.options import MASKS, option_types

from .types import CONCEPT, DELTA, MASK, OPTIONS, OptionValues

AUTO = "auto"
DETECTORS = ", ".join(name for name in WITHOUT_PATH if name != "attribute")  # a MODEL has no folder with a classifier
_CHOICES = {"mask": MASKS}
_TOOLTIPS = {  # where the help does not fit
    "mask": f"{', '.join(MASKS)} (the controls); for a file: SalUn Load Mask",
    "detector": f"Detector that decides whether images show the concept ({DETECTORS}) (default: self: the "
    "original model as classifier)",
}


@cache
def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(kind)}


def option_inputs(*names: str, kind: Any = EraseOptions) -> dict[str, Any]:
    """INPUT_TYPES entries of these options, of the dataclass `kind`."""
    return {name: option_input(name, kind) for name in names}


def option_input(name: str, kind: Any = EraseOptions) -> tuple[Any, dict[str, Any]]:
    """(type, settings) of the input for an option."""
    rules, default = _fields(kind)[name].metadata, _fields(kind)[name].default
    auto = default is None
    settings: dict[str, Any] = {"tooltip": _TOOLTIPS.get(name, rules["help"])}
    choices = _CHOICES.get(name) or rules["choices"]
    if choices:
        return [*([AUTO] if auto else []), *choices], {**settings, "default": AUTO if auto else default}
    of, _ = option_types(kind)[name]
    if of is bool:
        return "BOOLEAN", {**settings, "default": default}
    if of is str:
        return "STRING", {**settings, "default": default or "", "multiline": False}
    if of is list:
        help = rules["help"].replace("repeatable", "one per line")
        return "STRING", {"tooltip": help, "default": "", "multiline": True}
    low = automatic(name, kind) if auto else 0.0001 if rules["minimum"] is None else rules["minimum"]
    if auto:
        settings["tooltip"] += f" ({low:g}: automatic)"
    numbers = {"default": low if auto else default, "min": low, "max": rules["maximum"]}
    if of is int:
        if name == "seed":  # ComfyUI would draw a new seed, and so train, at every queue
            settings["control_after_generate"] = False
        return "INT", {**settings, **{key: min(int(number), 2**53) for key, number in numbers.items()}}
    step = 1e-6 if name == "lr" else 0.01
    return "FLOAT", {**settings, **{key: float(value) for key, value in numbers.items()}, "step": step, "round": False}


def automatic(name: str, kind: Any = EraseOptions) -> float:
    """The number that stands for automatic: just below the option's range."""
    low = _fields(kind)[name].metadata["minimum"]
    return 0 if low is None or low >= 1 else -1


def explicit(values: OptionValues, kind: Any = EraseOptions) -> dict[str, Any]:
    """A node's option inputs without those that are left at automatic; lists from their lines."""

    def is_automatic(name: str, value: Any) -> bool:
        if _fields(kind)[name].default is not None:
            return False
        return value in (AUTO, "") if isinstance(value, str) else bool(value == automatic(name, kind))

    def read(name: str, value: Any) -> Any:
        if option_types(kind)[name][0] is not list:
            return value
        return [line.strip() for line in value.splitlines() if line.strip()]

    return {name: read(name, value) for name, value in values.items() if not is_automatic(name, value)}


def erase_options(values: OptionValues, shared: OptionValues | None = None) -> EraseOptions:
    """The core's options from a node's inputs and those of SalUn Options. Raises ConfigError for invalid ones."""
    options = EraseOptions(**{**(shared or {}), **explicit(values)})
    if options.detector is not None:
        without_path(options.detector)
    return options


WIRES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", {"tooltip": "Encodes the prompts."}),
    "vae": ("VAE", {"tooltip": "Decodes the images before and after."}),
    "concept": (CONCEPT, {"tooltip": "From SalUn Concept."}),
    "options": (OPTIONS, {"tooltip": "From SalUn Options (default: the default of every option)."}),
    "mask": (MASK, {"tooltip": "From SalUn Saliency Mask, Load Mask or Combine Masks."}),
    "delta": (DELTA, {"tooltip": "From SalUn Erase or SalUn Load Delta."}),
}


def wires(*names: str) -> dict[str, Any]:
    """INPUT_TYPES entries that several nodes share."""
    return {name: WIRES[name] for name in names}


def filename_prefix(default: str) -> dict[str, Any]:
    """The INPUT_TYPES entry of a file name's beginning."""
    return {"filename_prefix": ("STRING", {"default": default, "tooltip": "Beginning of the file's name."})}


# where an option is set: these on the nodes that use them, all others on SalUn Options
NODE_OPTIONS = ("until", "steps", "batch_size", "lr", "retain_weight", "density", "mask", "eval_images", "seed")
GRAPH_OPTIONS = {  # options without an input, and what decides them in ComfyUI instead
    "device": "ComfyUI's choice",
    "components": "the loader's CLIP and VAE",
    "models_dir": "ComfyUI's folders",
    "prediction_type": "the MODEL's sampling (ModelSamplingDiscrete)",
    "allow_pickle": "the loader",
    "anchor": "SalUn Concept",
    "retain_prompts": "SalUn Concept",
    "forget_images": "SalUn Training Data",
    "retain_images": "SalUn Training Data",
    "attention": "always torch's (sdpa)",
    "save_every": "the core's default, and at an interrupt",
    "keep_ema": "SalUn Save Erased Checkpoint drops the EMA copy",
}
SHARED = tuple(
    name
    for names in GROUPS.values()
    for name in names
    if name in _fields(EraseOptions) and name not in NODE_OPTIONS and name not in GRAPH_OPTIONS
)
