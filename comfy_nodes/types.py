"""The types of the wires between SalUn nodes, and the base class of all nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.prompts.concepts import Concept
from salun.runs.cache import digest_of

CONCEPT, OPTIONS, DATA, MASK, DELTA = "SALUN_CONCEPT", "SALUN_OPTIONS", "SALUN_DATA", "SALUN_MASK", "SALUN_DELTA"
Concepts = tuple[Concept, ...]
"""SALUN_CONCEPT: one concept or several, in order."""
OptionValues = Mapping[str, Any]
"""SALUN_OPTIONS: values of the core's options by name, without those that are left at automatic."""


class Node:
    """What ComfyUI reads of every node: its menu, its method, its title, its outputs and its inputs."""

    CATEGORY, FUNCTION = "SalUn", "run"
    TITLE: ClassVar[str]
    DESCRIPTION: ClassVar[str]
    RETURN_TYPES: ClassVar[tuple[str, ...]]
    RETURN_NAMES: ClassVar[tuple[str, ...]]
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        raise NotImplementedError


def inputs_of(node: type[Node]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The inputs of a node that a person sees: name → (type or choices, settings)."""
    parts = node.INPUT_TYPES()
    return {name: entry for part in ("required", "optional") for name, entry in parts.get(part, {}).items()}


@dataclass(frozen=True)
class Data:
    """SALUN_DATA: training latents and encoded prompts, in CPU memory.

    Args:
        names: Names of the concepts.
        content: The training set.
        family: Family of the model that it was made with.
        anchors: Anchors of the concepts.
        prompts: Digest of all prompts.
        text: Digest of what the CLIP makes of a few prompts.
    """

    names: tuple[str, ...]
    content: ErasureData
    family: str
    anchors: tuple[str | None, ...]
    prompts: str
    text: str

    @property
    def digest(self) -> str:
        """A hash of all tensors."""
        tensors = []
        for item in fields(self.content):
            value = getattr(self.content, item.name)
            if isinstance(value, Conditioning):
                tensors += [value.hidden, *(value.extra[name] for name in sorted(value.extra))]
            elif isinstance(value, torch.Tensor):
                tensors.append(value)
        return digest_of(*tensors)


def data_on(data: ErasureData, device: torch.device | str) -> ErasureData:
    """A training set with all its tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Conditioning):
            return Conditioning(value.hidden.to(device), {name: v.to(device) for name, v in value.extra.items()})
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return replace(data, **{item.name: move(getattr(data, item.name)) for item in fields(data)})
