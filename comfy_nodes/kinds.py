"""What goes along the wires between SalUn nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.prompts.concepts import Concept
from salun.runs.cache import digest_of

CONCEPT, OPTIONS, DATA, MASK, DELTA = "SALUN_CONCEPT", "SALUN_OPTIONS", "SALUN_DATA", "SALUN_MASK", "SALUN_DELTA"
Concepts = tuple[Concept, ...]
"""SALUN_CONCEPT: one concept, or several in a row."""
Chosen = Mapping[str, Any]
"""SALUN_OPTIONS: the core's options by name, without those that were left at auto."""


class Node:
    """What all nodes have in common in ComfyUI's eyes: where they are in its menus, and the method that it calls."""

    CATEGORY, FUNCTION = "SalUn", "run"


@dataclass(frozen=True)
class Data:
    """SALUN_DATA: latents and encoded prompts, in host memory.

    names, anchors: of the concepts they are of. family: of the model that they were made with. prompts: a digest of
    all the prompts. text: one of what the CLIP makes of some.
    """

    names: tuple[str, ...]
    content: ErasureData
    family: str
    anchors: tuple[str | None, ...]
    prompts: str
    text: str

    @property
    def digest(self) -> str:
        """A hash of all its tensors."""
        found = []
        for item in fields(self.content):
            value = getattr(self.content, item.name)
            if isinstance(value, Conditioning):
                found += [value.hidden, *(value.extra[name] for name in sorted(value.extra))]
            elif isinstance(value, torch.Tensor):
                found.append(value)
        return digest_of(*found)

    def on(self, device: torch.device) -> ErasureData:
        """The content on a device."""
        return moved(self.content, device)


def moved(data: ErasureData, device: torch.device | str) -> ErasureData:
    """Everything on a device."""

    def there(value: Any) -> Any:
        if isinstance(value, Conditioning):
            return Conditioning(value.hidden.to(device), {name: v.to(device) for name, v in value.extra.items()})
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return replace(data, **{item.name: there(getattr(data, item.name)) for item in fields(data)})
