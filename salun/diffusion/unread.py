"""Options that have no effect: those that neither a method nor its mask or training set reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from salun.diffusion.options import EraseOptions
from salun.errors import ConfigError
from salun.methods import METHODS, option_names
from salun.options import BY_GRADIENT, MASKS

TRAINING = (
    "steps", "batch_size", "lr", "lr_decay", "optimizer", "retain_weight", "target", "target_guidance", "retain_target",
    "anchor_share", "harden", "harden_weight", "gradient_surgery", "forget_timesteps",
)  # fmt: skip
OF_MASK = ("density", "combine", "guidance")
OF_DATA = ("forget_latents", "forget_images", "retain_latents", "retain_images")
LISTED = (*TRAINING, *OF_MASK, *OF_DATA, *option_names("diffusion"))


def unread(options: EraseOptions) -> list[str]:
    """The names of options that differ from their defaults, but have no effect with the others."""
    method, defaults = METHODS["diffusion"][options.method], _defaults(options)
    true = {"density": 1.0, **method.defaults} if _mask(options) == "full" else method.defaults
    ignored = without_effect(options)
    return [
        name
        for name in LISTED
        if name in ignored and getattr(options, name) not in (defaults[name], true.get(name, MISSING))
    ]


def without_effect(options: EraseOptions) -> set[str]:
    """The names of options that have no effect with the others, whatever their values."""
    method = METHODS["diffusion"][options.method]
    read = {*method.reads, *(item.name for item in fields(method.options)), *_of_mask(options), *_of_data(options)}
    if method.hardens:
        read |= {"harden", *(("harden_weight",) if options.harden else ())}
    if method.salun_losses:
        read |= {"gradient_surgery", "forget_timesteps"}
    if options.until is not None:  # its detector may look at the anchor's samples
        read.add("anchor_share")
    return {*LISTED} - read


def without(options: EraseOptions, names: Sequence[str]) -> EraseOptions:
    """The options with these at their defaults."""
    defaults = _defaults(options)
    return replace(options, **{name: defaults[name] for name in names})


def check_read(options: EraseOptions, names: Sequence[str]) -> None:
    """Raise ConfigError for the first of these options, which have no effect; the advice names all of them."""
    if not names:
        return
    method, name = METHODS["diffusion"][options.method], names[0]
    if name in OF_MASK and method.takes_mask:
        reason = f"the mask {_mask(options)}" if _mask(options) in MASKS else "a mask file"
    elif name == "harden_weight" and method.hardens:
        reason = "harden at 0"
    else:
        reason = f"the method {method.name}"
    raise _no_effect(options, names, reason)


def check_shared(options: EraseOptions, variants: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for options that have no effect with any of several variants of them."""
    unused = [{*unread(replace(options, **variant))} - {*variant} for variant in variants]
    names = [name for name in LISTED if all(name in each for each in unused)]
    if names:
        raise _no_effect(options, names, "any of the methods compared")


def _no_effect(options: EraseOptions, names: Sequence[str], reason: str) -> ConfigError:
    """The error of the first of these options; the advice names all of them."""
    listed = [f"{{{each}}}" for each in names]
    others = f"{', '.join(listed[:-1])} and {listed[-1]}" if listed[1:] else listed[0]
    value = getattr(options, names[0])
    return ConfigError(f"is {value}, but has no effect with {reason}", option=names[0], advice=f"Omit {others}")


def _of_mask(options: EraseOptions) -> tuple[str, ...]:
    """The options that finding the mask reads."""
    mask = _mask(options)
    if mask in BY_GRADIENT:
        return OF_MASK
    return ("density",) if mask in ("random", "learned") else ()


def _of_data(options: EraseOptions) -> tuple[str, ...]:
    """The options that building the training set reads; as `Plan.samples`."""
    method, mask = METHODS["diffusion"][options.method], _mask(options)
    by_anchor = method.data == "anchor" and mask in BY_GRADIENT
    if method.data == "latents" or options.until is not None or mask == "saliency-ratio" or by_anchor:
        return OF_DATA
    if method.data == "anchor":
        return OF_DATA[:1]
    return OF_DATA[:2] if method.data == "forget" or mask in BY_GRADIENT else ()


def _mask(options: EraseOptions) -> str:
    """The mask: the one given, or the method's."""
    method = METHODS["diffusion"][options.method]
    return options.mask if method.takes_mask and options.mask is not None else method.mask


def _defaults(options: EraseOptions) -> dict[str, Any]:
    return {item.name: item.default for item in fields(options) if item.default is not MISSING}
