"""The core's options as inputs of nodes: type, default, range and tooltip come from the dataclass.

An input has no empty state, so an option that the core decides where it is unset (None) has the value `auto`, which its
tooltip explains. A number with such a default is a text in ComfyUI, `auto` or a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import Any

from salun.checkpoints.locate import aliases
from salun.detectors import WITHOUT_PATH, without_path
from salun.diffusion.goal import Goal
from salun.diffusion.options import GROUPS, OF_RECIPE, EraseOptions, Recipe
from salun.errors import ConfigError
from salun.methods import METHODS, option_names
from salun.options import MASKS, option_types

from .paths import validation
from .types import CONCEPT, DATA, DELTA, MASK, OPTIONS, OptionValues

AUTO = "auto"
DETECTORS = ", ".join(name for name in WITHOUT_PATH if name != "attribute")  # a MODEL has no folder with a classifier
_CHOICES = {
    "mask": MASKS,
    "method": tuple(name for name, method in METHODS["diffusion"].items() if not method.attention),  # see `GraphModel`
}
_TOOLTIPS = {  # where the help does not fit
    "mask": f"Weights to train: {', '.join(MASKS)}; the last three are controls. For a file: SalUn Load Mask",
    "detector": f"Detector that decides whether images show the concept ({DETECTORS}), with an argument after a colon "
    "where it takes one",
    "method": "Unlearning method; uce, rece and speed take seconds",
    "optimizer": "Optimizer; adam8bit keeps its moments in 8 bits and needs the package bitsandbytes",
}
_AUTO = {  # what `auto` is, where the option's own text does not fit
    "mask": "saliency for the methods salun and ant, full for others",
    "detector": "self, the original model as classifier",
    "resolution": "512 for SD 1.x, 768 or 512 for SD 2.x, 1024 for SDXL",
    "until": f"{Goal()} for the method salun without steps, lr_decay and recipe; else a fixed number of steps",
}
_SAME = ("eval_images",)  # options of recipes that have one value in all of them, which is their default here
_PLAIN = ("negative_prompt",)  # optional texts of which the empty one is the default
RECIPES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


@cache
def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(kind)}


def option_inputs(*names: str, kind: Any = EraseOptions, advanced: Iterable[str] = ()) -> dict[str, Any]:
    """INPUT_TYPES entries of these options, of the dataclass `kind`.

    Args:
        advanced: Those that the front end hides at first.
    """
    entries = {name: option_input(name, kind) for name in names}
    for name in advanced:
        entries[name][1]["advanced"] = True
    return entries


def option_input(name: str, kind: Any = EraseOptions) -> tuple[Any, dict[str, Any]]:
    """(type, settings) of the input for an option."""
    rules = _fields(kind)[name].metadata
    default: Any = getattr(Recipe(), name) if name in _SAME else _fields(kind)[name].default
    auto, (of, _) = has_auto(name, kind), option_types(kind)[name]
    tooltip = _TOOLTIPS.get(name, rules["text"]).replace("repeatable", "one per line").replace("`", "")
    settings: dict[str, Any] = {"tooltip": f"{tooltip}. auto: {auto_means(name, kind)}." if auto else f"{tooltip}."}
    choices = _CHOICES.get(name) or rules["choices"]
    if choices:
        return [*([AUTO] if auto else []), *choices], {**settings, "default": AUTO if auto else default}
    if of in (str, list) or auto:
        default = AUTO if auto else default if isinstance(default, str) else ""
        return "STRING", {**settings, "default": default, "multiline": of is list}
    if of is bool:
        return "BOOLEAN", {**settings, "default": default}
    low = 0.0001 if rules["minimum"] is None else rules["minimum"]
    numbers = {"default": default, "min": low, "max": rules["maximum"]}
    if of is int:
        if name == "seed":  # ComfyUI would draw a new seed, and so train, at every queue
            settings["control_after_generate"] = False
        return "INT", {**settings, **{key: min(int(number), 2**53) for key, number in numbers.items()}}
    step = 0.01 if not 0 < default < 0.01 else float(default)  # ComfyUI shows as many digits as the step has
    return "FLOAT", {**settings, **{key: float(value) for key, value in numbers.items()}, "step": step, "round": False}


def has_auto(name: str, kind: Any = EraseOptions) -> bool:
    """Whether the core decides about an option that is unset."""
    item = _fields(kind)[name]
    if option_types(kind)[name][0] is list:
        return bool(item.metadata["auto"])
    return item.default is None and name not in (*_PLAIN, *_SAME)


def auto_means(name: str, kind: Any = EraseOptions) -> str:
    """What `auto` stands for, as the end of a tooltip."""
    text = _AUTO.get(name, _fields(kind)[name].metadata["auto"].replace(OF_RECIPE, "{}") or "{}")
    return text.format(_of_recipe(name)) if "{}" in text else text


@cache
def _of_recipe(name: str) -> str:
    """The value of an option in the models' recipes, and the families in which it is another."""
    standard = getattr(Recipe(), name)
    first, *others = (aliases()["families"][family].get("recipe", {}).get(name, standard) for family in RECIPES)
    named = zip(list(RECIPES.values())[1:], others, strict=True)
    return _shown(first) + "".join(f", {_shown(value)} for {family}" for family, value in named if value != first)


def _shown(value: Any) -> str:
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def explicit(values: OptionValues, kind: Any = EraseOptions) -> dict[str, Any]:
    """A node's option inputs without those that are `auto` or empty; numbers and lists read from their texts.

    Raises:
        ConfigError: A text is neither `auto` nor a number of the option's type.
    """
    return {name: _read(name, value, kind) for name, value in values.items() if not _is_unset(name, value, kind)}


def _is_unset(name: str, value: Any, kind: Any) -> bool:
    unset = has_auto(name, kind) or _fields(kind)[name].default is None
    return unset and isinstance(value, str) and value.strip().lower() in (AUTO, "")


def _read(name: str, value: Any, kind: Any) -> Any:
    of = option_types(kind)[name][0]
    if not isinstance(value, str) or of not in (int, float, list):
        return value
    if of is list:
        return [line.strip() for line in value.splitlines() if line.strip()]
    try:
        number = float(value)
        if of is int and not number.is_integer():
            raise ValueError
    except ValueError as error:
        wanted = "an integer" if of is int else "a number"
        raise ConfigError(f"is {value[:40]!r}, but must be auto or {wanted}", option=name) from error
    return int(number) if of is int else number


def erase_options(values: OptionValues, shared: OptionValues | None = None) -> EraseOptions:
    """The core's options from a node's inputs and those of SalUn Options. Raises ConfigError for invalid ones."""
    options = EraseOptions(**{**(shared or {}), **explicit(values)})
    if options.detector is not None:
        without_path(options.detector)
    return options


def options_validation(**values: Any) -> bool | str:
    """VALIDATE_INPUTS of a node with options: True, or what is wrong. None stands for a value from another node."""
    return validation(None, "", lambda: erase_options({n: v for n, v in values.items() if v is not None}))


WIRES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", {"tooltip": "Text encoder of the prompts."}),
    "vae": ("VAE", {"tooltip": "Decoder of the images before and after."}),
    "concept": (CONCEPT, {"tooltip": "Concepts to erase, from SalUn Concept."}),
    "options": (OPTIONS, {"tooltip": "Less common options, from SalUn Options. Unconnected: their defaults."}),
    "mask": (MASK, {"tooltip": "Mask, from SalUn Saliency Mask, Load Mask or Combine Masks."}),
    "data": (DATA, {"tooltip": "Training set, from SalUn Training Data. Unconnected: sampled here."}),
    "delta": (DELTA, {"tooltip": "Delta, from SalUn Erase or SalUn Load Delta."}),
}


def wires(*names: str) -> dict[str, Any]:
    """INPUT_TYPES entries that several nodes share."""
    return {name: WIRES[name] for name in names}


def filename_prefix(default: str) -> dict[str, Any]:
    """The INPUT_TYPES entry of a file name's beginning."""
    tooltip = "Beginning of the file's name, to which a number is added; it may begin with a folder."
    return {"filename_prefix": ("STRING", {"default": default, "tooltip": tooltip})}


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
    "as_given": "low_vram and batch_size, by hand: a MODEL has no files whose shapes could be simulated",
    "save_every": "the core's default, and at an interrupt",
    "keep_ema": "SalUn Save Erased Checkpoint drops the EMA copy",
    "harden": "it needs the text encoder's tokens, which a CLIP does not show",
    "harden_weight": "as harden",
}
SHARED = tuple(
    name
    for names in GROUPS.values()
    for name in names
    if name in _fields(EraseOptions) and name not in NODE_OPTIONS and name not in GRAPH_OPTIONS
)
METHOD = ("method", *option_names("diffusion"))  # of SalUn Method; the others of `SHARED` are of SalUn Options
IN_VIEW = (  # of SalUn Options; the others are advanced inputs
    "resolution", "sampling_steps", "sampling_guidance", "sampler", "negative_prompt", "forget_latents",
    "retain_latents", "detector", "show_sensitive", "low_vram",
)  # fmt: skip
