"""The core's options as inputs of nodes: type, default, range and tooltip come from the dataclass.

An input has no empty state, so `auto` (None in the core) is a number just outside the range, an empty text, or a choice
named "auto".
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

from salun.diffusion.options import GROUPS, EraseOptions
from salun.options import MASKS

from .kinds import CONCEPT, DELTA, OPTIONS, Chosen

AUTO = "auto"
_FIELDS = {item.name: item for item in dataclasses.fields(EraseOptions)}
_CHOICES = {"mask": MASKS}
_TOOLTIPS = {"mask": f"{', '.join(MASKS)} (the controls); for a file: SalUn Load Mask"}  # where the help does not fit
NO_RECIPE = ("clip_skip", "resolution", "sampling_steps", "sampling_guidance")  # whose help tells their default


def inputs(*names: str) -> dict[str, Any]:
    """INPUT_TYPES entries of these options."""
    return {name: entry(name) for name in names}


def entry(name: str) -> tuple[Any, dict[str, Any]]:
    """(type, settings) of one option."""
    item = _FIELDS[name]
    rules, own = item.metadata, item.default
    told: dict[str, Any] = {"tooltip": _TOOLTIPS.get(name, rules["help"])}
    if name == "seed":
        told["control_after_generate"] = False  # a new seed at every queue would train at every queue
    kind = str(item.type).replace(" | None", "")
    choices = _CHOICES.get(name) or rules["choices"]
    if choices:
        free = [AUTO] if item.default is None else []
        return [*free, *choices], {**told, "default": AUTO if own is None else own}
    if kind == "bool":
        return "BOOLEAN", {**told, "default": own}
    if kind.startswith(("int", "float")):
        low, high = rules["minimum"], rules["maximum"]
        if item.default is None:
            low = automatic(name)
            own = low if own is None else own
            told["tooltip"] += f" ({low:g}: {'the default' if name in NO_RECIPE else 'from the recipe'})"
        elif low is None:
            low = 0.0001
        if kind.startswith("int"):
            return "INT", {**told, "default": own, "min": int(low), "max": min(int(high), 2**53)}
        step = 1e-6 if name == "lr" else 0.01
        return "FLOAT", {
            **told,
            "default": float(cast(float, own)),
            "min": float(low),
            "max": float(high),
            "step": step,
            "round": False,
        }
    return "STRING", {**told, "default": own or "", "multiline": False}


def automatic(name: str) -> float:
    """The number that stands for `auto`: below the option's range."""
    rules = _FIELDS[name].metadata
    low = rules["minimum"]
    if low is None or low >= 1:
        return 0
    return -1


def chosen_of(given: Chosen) -> dict[str, Any]:
    """A node's inputs without those that are left at auto."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        automatically = value in (AUTO, "") if isinstance(value, str) else value == automatic(name)
        if _FIELDS[name].default is not None or not automatically:
            found[name] = value
    return found


def options_of(given: Chosen, wired: Chosen | None = None) -> EraseOptions:
    """The core's options from a node's inputs and SalUn Options. Raises ConfigError for what is out of range."""
    return EraseOptions(**{**(wired or {}), **chosen_of(given)})


def in_inputs_names(text: str) -> str:
    """A message of the core with the names of inputs and nodes in place of the command line's."""
    for theirs, ours in _COMMANDS.items():
        text = text.replace(theirs, ours)
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda flag: flag[1].replace("-", "_"), text)


_COMMANDS = {
    "`salun delta apply` with --fine-tune-of-base, and": "SalUn Apply Delta, with base_checkpoint set to",
    "--fine-tune-of-base": "base_checkpoint",
    "`salun mask --model the MODEL in the graph`": "SalUn Saliency Mask",
    "apply all at once by `salun delta stack`": "let one SalUn Apply Delta follow the other",
    "salun[bitsandbytes]": "bitsandbytes",
    "--retain-images": "pictures to keep in SalUn Training Data",
}

WIRES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", {"tooltip": "Encodes the concept's prompts."}),
    "vae": ("VAE", {"tooltip": "Shows the pictures before and after."}),
    "concept": (CONCEPT, {"tooltip": "From SalUn Concept."}),
    "options": (OPTIONS, {"tooltip": "From SalUn Options; without it the defaults."}),
    "delta": (DELTA, {"tooltip": "From SalUn Erase or SalUn Load Delta."}),
}


def wires(*names: str) -> dict[str, Any]:
    """INPUT_TYPES entries that several nodes have alike."""
    return {name: WIRES[name] for name in names}


def prefix(default: str) -> dict[str, Any]:
    """The INPUT_TYPES entry of a file's name."""
    return {"filename_prefix": ("STRING", {"default": default, "tooltip": "The beginning of the file's name."})}


# on which node an option is: each of these on its own, all others on SalUn Options
OWN = ("steps", "batch_size", "lr", "retain_weight", "density", "mask", "eval_images", "seed")
HOST = {  # options that the graph itself answers, with what does
    "device": "ComfyUI's own choice",
    "components": "the loader's CLIP and VAE",
    "models_dir": "ComfyUI's folders",
    "prediction_type": "the MODEL's sampling (ModelSamplingDiscrete)",
    "allow_pickle": "the loader",
    "anchor": "SalUn Concept",
    "retain_prompts": "SalUn Concept",
    "forget_images": "SalUn Training Data",
    "retain_images": "SalUn Training Data",
    "attention": "always torch's own (sdpa)",
    "save_every": "the core's default, and at an interrupt",
    "keep_ema": "SalUn Save Erased Checkpoint drops the EMA copy",
}
SHARED = tuple(
    name for names in GROUPS.values() for name in names if name in _FIELDS and name not in OWN and name not in HOST
)
