"""A MODEL's UNet as tensors under diffusers' names, and differences put back onto it as ComfyUI's patches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from salun.checkpoints.hashing import base_hash
from salun.checkpoints.keymap import unet_from_ldm, unet_to_ldm
from salun.delta.delta import Delta
from salun.delta.xor import Change
from salun.errors import ModelError

OUTER = "model."  # of LDM names, before what ComfyUI calls a weight
HALVES = (torch.float16, torch.bfloat16)
_known: WeakKeyDictionary[Any, dict[Any, tuple[torch.dtype | None, str]]] = WeakKeyDictionary()
"""Of each model, for each state of its patches (None for none): the dtype it is told in, and its hash once known."""


class Weights(Mapping[str, Tensor]):
    """The UNet's tensors as the graph has them, on the CPU, each made when it is asked for.

    patched: with the patches that come before in the graph (a LoRA, another erasure), or as the file has them.
    A model that ComfyUI widened (an fp16 file on a CPU) is told in the file's dtype if every weight fits it to the bit,
    so that its hash is the file's. fp8 is told in fp16, which holds it exactly.
    """

    def __init__(self, model: Any, patched: bool = True) -> None:
        entries = model.get_key_patches("diffusion_model.")
        try:
            names = unet_from_ldm(OUTER + key for key in entries)
        except KeyError as error:
            raise ModelError(f"this MODEL has a weight that no UNet of SD 1, 2 or XL has: {error}") from error
        self.keys_of = {ours: theirs.removeprefix(OUTER) for theirs, ours in names.items()}
        self._entries = {ours: entries[key] for ours, key in self.keys_of.items()}
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
        """A tensor's shape, without making it."""
        return tuple(self._entries[name][0][0].shape)

    @property
    def hash(self) -> str:
        """The base hash, computed once for each state of a model."""
        found = self._facts[self._state][1]
        if not found:
            found = base_hash(self)
            self._facts[self._state] = (self._dtype, found)
        return found

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
        fitting = list(HALVES)
        for name in self._order:
            value = self._value(name)
            if value.dtype != torch.float32:
                return None
            fitting = [kind for kind in fitting if torch.equal(value.to(kind).float(), value)]
            if not fitting:
                return None
        return fitting[0]


_WORDS = (
    "conv_in time_embedding add_embedding linear_1 linear_2 down_blocks up_blocks mid_block conv_norm_out conv_out "
    "attentions resnets downsamplers upsamplers norm proj_in transformer_blocks norm1 attn1 conv1 time_emb_proj norm2 "
    "attn2 conv2 conv_shortcut norm3 ff to_q to_k to_v to_out net proj proj_out conv weight bias"
)
_RANK = {word: rank for rank, word in enumerate(_WORDS.split())}


def module_order(name: str) -> tuple[tuple[int, int], ...]:
    """Sorts names as diffusers' UNet lists its parameters, on which a mask's ties and random masks depend."""
    return tuple((0, int(part)) if part.isdigit() else (1, _RANK[part]) for part in name.split("."))


@functools.cache
def _sparse() -> Any:
    from comfy.weight_adapter import WeightAdapterBase

    class SparseDifference(WeightAdapterBase):  # type: ignore[misc]
        """Adds values at some entries of a weight.

        weights: (places, values, delta): places as `Change` has them, and the id of the delta that they are of. (All in
        one, since ComfyUI makes an adapter anew of its `loaded_keys` and of its `weights` with tensors moved.)
        """

        name = "salun"

        def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor, str]) -> None:
            self.loaded_keys, self.weights = loaded_keys, weights

        def calculate_weight(
            self,
            weight: Tensor,
            key: str,
            strength: float,
            strength_model: float,
            offset: Any,
            function: Any,
            intermediate_dtype: torch.dtype = torch.float32,
            original_weight: Any = None,
        ) -> Tensor:
            if strength:
                places, values = (part.to(weight.device) for part in self.weights[:2])
                added = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
                added[_index(places, weight.numel())] = values.to(weight.dtype) * strength
                weight += (function or (lambda a: a))(added.view(weight.shape))
            return weight

    return SparseDifference


def _index(places: Tensor, n: int) -> Tensor:
    """What picks the changed entries: places are packed bits (uint8), or flat indices (int64)."""
    if places.dtype != torch.uint8:
        return places
    shifts = torch.arange(8, dtype=torch.uint8, device=places.device)
    return ((places[:, None] >> shifts) & 1).view(-1)[:n].bool()


def patched(model: Any, delta: Delta, base: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the MODEL with the delta's differences as patches; base: the tensors that the delta was made from."""
    kind = _sparse()
    keys = unet_to_ldm(base)
    patches = {}
    for name, change in delta.changes.items():
        key = keys[name].removeprefix(OUTER)
        patches[key] = kind({key}, (_places(change), _values(change, base[name]), delta.id))
    clone = model.clone()
    taken = clone.add_patches(patches, strength, 1.0)
    if len(taken) != len(patches):
        raise ModelError(
            f"the MODEL took {len(taken)} of {len(patches)} changed tensors: it is another than the delta's"
        )
    return clone


def holds(model: Any, delta: Delta) -> bool:
    """Whether a MODEL has all of a delta's differences in full: its patches' strengths add up to 1, and none is undone.

    (What a later merge scales or sets anew is no longer the erasure's.)
    """
    keys = unet_to_ldm(Weights(model, patched=False))

    def whole(name: str) -> bool:
        patches = model.patches.get(keys[name].removeprefix(OUTER), [])
        own = [i for i, patch in enumerate(patches) if _is_of(patch, delta)]
        strength = sum(patches[i][0] for i in own)
        later = patches[own[0] :] if own else []
        kept = all(scale == 1 and not (isinstance(what, tuple) and what[0] == "set") for _, what, scale, *_ in later)
        return abs(strength - 1) < 1e-6 and kept

    return all(name in keys and whole(name) for name in delta.changes)


def holds_alone(model: Any, delta: Delta) -> bool:
    """Whether a MODEL is its checkpoint with this delta in full, and nothing else in its weights."""
    return holds(model, delta) and all(_is_of(patch, delta) for found in model.patches.values() for patch in found)


def _is_of(patch: Sequence[Any], delta: Delta) -> bool:
    return isinstance(patch[1], _sparse()) and patch[1].weights[2] == delta.id


def _places(change: Change) -> Tensor:
    if change.kind == "index":
        return torch.from_numpy(change.as_index().astype("int64"))
    return torch.from_numpy(change.indices)


def _values(change: Change, old: Tensor) -> Tensor:
    """new − old of the changed entries, in the narrowest dtype that holds them exactly."""
    exact = change.difference(old)
    for kind in HALVES:
        if change.dtype == kind and torch.equal(exact.to(kind).float(), exact):
            return exact.to(kind)
    return exact
