"""The core's options as inputs of nodes: type, default, range and tooltip come from the dataclass.

An input has no empty state, so `auto` (None in the core) is a number just outside the range, an empty text, or a choice
named "auto".
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from salun.options import MASKS, EraseOptions

AUTO = "auto"
_FIELDS = {item.name: item for item in dataclasses.fields(EraseOptions)}
_CHOICES = {"mask": MASKS}  # a file is another node's matter
NO_RECIPE = ("clip_skip", "resolution")  # whose help tells their default


def inputs(*names: str, advanced: bool = False, **other: Any) -> dict[str, Any]:
    """INPUT_TYPES entries of these options; other: defaults that the node has of its own."""
    return {name: entry(name, advanced, other.get(name)) for name in names}


def entry(name: str, advanced: bool = False, default: Any = None) -> tuple[Any, dict[str, Any]]:
    """(type, settings) of one option."""
    item = _FIELDS[name]
    rules, own = item.metadata, item.default if default is None else default
    told: dict[str, Any] = {"tooltip": rules["help"]}
    if advanced:
        told["advanced"] = True
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


def options_of(given: dict[str, Any]) -> EraseOptions:
    """The core's options from a node's inputs. Raises ConfigError for what is out of range."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if _FIELDS[name].default is None:
            text = isinstance(value, str)
            if value in (AUTO, "") if text else value == automatic(name):
                continue
        found[name] = value
    return EraseOptions(**found)


# which options which node has
SAMPLING = ("forget_latents", "retain_latents", "resolution", "prompt_style", "negative_prompt", "clip_skip", "seed")
MASKING = ("mask", "density", "combine", "scope", "guidance")
TRAINING = ("steps", "batch_size", "lr", "retain_weight")
MORE = ("method", "lr_decay", "target", "retain_target", "anchor_share", "recipe", "eval_images", "show_sensitive")
COMPUTING = ("dtype", "low_vram", "gradient_checkpointing", "optimiser", "deterministic")
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
    "save_every": "no saved state in a graph",
    "keep_ema": "SalUn Save Erased Checkpoint drops the EMA copy",
}
