"""A MODEL's UNet as a mapping of tensors under diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from salun.checkpoints.hashing import base_hash
from salun.checkpoints.keymap import unet_from_ldm
from salun.errors import ModelError

OUTER = "model."  # precedes ComfyUI's name of a weight in LDM names
_known: WeakKeyDictionary[Any, dict[Any, tuple[torch.dtype | None, str]]] = WeakKeyDictionary()
"""For each model and state of its patches (None: without): the dtype of its tensors here, and its hash once known."""


class Weights(Mapping[str, Tensor]):
    """The UNet's tensors in the graph, each made on the CPU when it is accessed.

    A model that ComfyUI widened (an fp16 file on a CPU) has the file's dtype here if that represents every weight
    exactly, so that its hash is the file's. fp8 becomes fp16, which is exact.

    Args:
        patched: With the graph's patches so far (a LoRA, another erasure), or as in the file.
    """

    def __init__(self, model: Any, patched: bool = True) -> None:
        entries = model.get_key_patches("diffusion_model.")
        try:
            names = unet_from_ldm(OUTER + key for key in entries)
        except KeyError as error:
            raise ModelError(f"this MODEL has a weight that is not in a UNet of SD 1, SD 2 or SDXL: {error}") from error
        self.keys_of = {name: ldm.removeprefix(OUTER) for ldm, name in names.items()}
        self._entries = {name: entries[key] for name, key in self.keys_of.items()}
        self._order = sorted(self._entries, key=module_order)
        self.patched = patched and any(len(entry) > 1 for entry in self._entries.values())
        self._state = model.patches_uuid if self.patched else None
        self._facts = _known.setdefault(model.model, {})
        if self._state not in self._facts:
            self._facts[self._state] = (self._narrowest(), "")
        self._dtype = self._facts[self._state][0]

    def __getitem__(self, name: str) -> Tensor:
        value = self._value(name)
        return value.to(self._dtype or value.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without making the tensor."""
        return tuple(self._entries[name][0][0].shape)

    @property
    def hash(self) -> str:
        """The base hash, computed once for each state of a model."""
        known = self._facts[self._state][1]
        if not known:
            known = base_hash(self)
            self._facts[self._state] = (self._dtype, known)
        return known

    def _value(self, name: str) -> Tensor:
        import comfy.lora

        (weight, convert), *patches = self._entries[name]
        with torch.no_grad():
            stored: Tensor = convert(weight.detach().cpu(), inplace=False)
            plain = stored.to(torch.float16) if stored.element_size() == 1 else stored
            if not self.patched or not patches:
                return plain.clone()
            value: Tensor = comfy.lora.calculate_weight(patches, plain.to(torch.float32, copy=True), self.keys_of[name])
            return value.to(plain.dtype)

    def _narrowest(self) -> torch.dtype | None:
        fitting = [torch.float16, torch.bfloat16]
        for name in self._order:
            value = self._value(name)
            if value.dtype != torch.float32:
                return None
            fitting = [half for half in fitting if torch.equal(value.to(half).float(), value)]
            if not fitting:
                return None
        return fitting[0]


_PARTS = (
    "conv_in time_embedding add_embedding linear_1 linear_2 down_blocks up_blocks mid_block conv_norm_out conv_out "
    "attentions resnets downsamplers upsamplers norm proj_in transformer_blocks norm1 attn1 conv1 time_emb_proj norm2 "
    "attn2 conv2 conv_shortcut norm3 ff to_q to_k to_v to_out net proj proj_out conv weight bias"
)
_RANK = {part: rank for rank, part in enumerate(_PARTS.split())}


def module_order(name: str) -> tuple[tuple[int, int], ...]:
    """A sort key that gives the order of diffusers' UNet, on which a mask's ties and random masks depend."""
    return tuple((0, int(part)) if part.isdigit() else (1, _RANK[part]) for part in name.split("."))
