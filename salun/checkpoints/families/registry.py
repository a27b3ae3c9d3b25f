"""The families that salun supports, and which of them a model is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from salun.checkpoints.families import classes, sd1, sd2, sdxl
from salun.checkpoints.families.family import Family, Network, Shapes
from salun.errors import ModelError

FAMILIES: dict[str, Family] = {family.name: family for family in (sd1.FAMILY, sd2.FAMILY, sdxl.FAMILY)}
"""Families of text-to-image models, whose single files are recognized."""
FOLDER_FAMILIES: dict[str, Family] = {**FAMILIES, **{family.name: family for family in (classes.PIXELS, classes.DIT)}}
"""All families that a diffusers folder may be of."""
NETWORK_PARTS = tuple(dict.fromkeys(family.network.part for family in FOLDER_FAMILIES.values()))
TITLES = ", ".join(family.title for family in FAMILIES.values())


def network_of(names: Iterable[str]) -> Network | None:
    """The network that a single file with these names holds; None for a file without one."""
    prefixes = {family.network.prefix: family.network for family in FAMILIES.values()}
    names = list(names)
    return next((net for prefix, net in prefixes.items() if any(name.startswith(prefix) for name in names)), None)


def network_part(folder: Path) -> str:
    """The name of the network's folder in a diffusers folder; "unet" where there is none."""
    return next((part for part in NETWORK_PARTS if (folder / part).is_dir()), NETWORK_PARTS[0])


def recognize(shapes: Shapes) -> Family:
    """The family of a network. shapes: diffusers name → shape of its tensors.

    Raises:
        ModelError: No family has such tensors, or an unsupported relative of one has. The message is a predicate of
            the model: "is an SDXL refiner…".
    """
    family = next((family for family in FAMILIES.values() if family.matches(shapes)), None)
    if family is None:
        raise ModelError(f"is of no supported family ({TITLES})")
    if what := family.relative(shapes):
        raise ModelError(f"is {what}")
    return family


def families_of(pipeline: str) -> list[Family]:
    """The families of a diffusers pipeline class."""
    return [family for family in FOLDER_FAMILIES.values() if pipeline in (family.pipeline, *family.also)]


def family_for_hosts(tensors: Mapping[str, Tensor]) -> Family:
    """The family that hosts take a network for: by its names and the width of its text alone.

    tensors: all of the network's, of which one is read.
    """
    text = next((name for name in tensors if name.endswith("attn2.to_k.weight")), None)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, ())
    if text is not None:
        shapes[text] = tuple(tensors[text].shape)
    return recognize(shapes)
