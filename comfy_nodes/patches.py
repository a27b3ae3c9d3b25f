"""Deltas as ComfyUI's patches on a MODEL."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.keymap import unet_to_ldm
from salun.delta.delta import Delta
from salun.delta.xor import Change
from salun.errors import ModelError

from .weights import OUTER, Weights

HALVES = (torch.float16, torch.bfloat16)


def apply_delta_patch(model: Any, delta: Delta, base: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the MODEL with the delta's differences as patches.

    Args:
        base: The tensors that the delta was made from.

    Raises:
        ModelError: The MODEL lacks weights that the delta changes.
    """
    adapter = _sparse_adapter()
    keys = unet_to_ldm(base)
    patches = {}
    for name, change in delta.changes.items():
        key = keys[name].removeprefix(OUTER)
        patches[key] = adapter({key}, (_index_tensor(change), _values(change, base[name]), delta.id))
    clone = model.clone()
    accepted = clone.add_patches(patches, strength, 1.0)
    if len(accepted) != len(patches):
        raise ModelError(
            f"the MODEL has only {len(accepted)} of the {len(patches)} tensors that the delta changes; it is another "
            "model"
        )
    return clone


def has_delta(model: Any, delta: Delta) -> bool:
    """Whether a MODEL has all of a delta's differences: patches whose strengths sum to 1, and no later merge.

    (A merge scales or replaces a weight, so that the erasure is in it only in part.)
    """
    keys = unet_to_ldm(Weights(model, patched=False))

    def is_complete(name: str) -> bool:
        patches = model.patches.get(keys[name].removeprefix(OUTER), [])
        indices = [i for i, patch in enumerate(patches) if _is_of(patch, delta)]
        strength = sum(patches[i][0] for i in indices)
        later = patches[indices[0] :] if indices else []
        return abs(strength - 1) < 1e-6 and all(
            scale == 1 and not (isinstance(value, tuple) and value[0] == "set") for _, value, scale, *_ in later
        )

    return all(name in keys and is_complete(name) for name in delta.changes)


def has_only_delta(model: Any, delta: Delta) -> bool:
    """Whether a MODEL is its checkpoint with this delta at strength 1 and no other patches."""
    return has_delta(model, delta) and all(
        _is_of(patch, delta) for patches in model.patches.values() for patch in patches
    )


def _is_of(patch: Sequence[Any], delta: Delta) -> bool:
    return isinstance(patch[1], _sparse_adapter()) and patch[1].weights[2] == delta.id


@functools.cache
def _sparse_adapter() -> Any:
    from comfy.weight_adapter import WeightAdapterBase

    class SparseDifference(WeightAdapterBase):  # type: ignore[misc]
        """Adds values to some entries of a weight.

        Args:
            weights: (indices, values, id): indices as `Change` stores them, and the id of their delta. (One tuple,
                since ComfyUI copies an adapter from its `loaded_keys` and its `weights`, with tensors moved.)
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
                indices, values = (part.to(weight.device) for part in self.weights[:2])
                added = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
                added[_selector(indices, weight.numel())] = values.to(weight.dtype) * strength
                weight += (function or (lambda a: a))(added.view(weight.shape))
            return weight

    return SparseDifference


def _selector(indices: Tensor, n: int) -> Tensor:
    """What selects the changed entries of n: packed bits (uint8) are unpacked, flat indices (int64) returned."""
    if indices.dtype != torch.uint8:
        return indices
    shifts = torch.arange(8, dtype=torch.uint8, device=indices.device)
    return ((indices[:, None] >> shifts) & 1).view(-1)[:n].bool()


def _index_tensor(change: Change) -> Tensor:
    if change.kind == "index":
        return torch.from_numpy(change.as_index().astype("int64"))
    return torch.from_numpy(change.indices)


def _values(change: Change, old: Tensor) -> Tensor:
    """new − old of the changed entries, in the narrowest dtype that represents them exactly."""
    exact = change.difference(old)
    for half in HALVES:
        if change.dtype == half and torch.equal(exact.to(half).float(), exact):
            return exact.to(half)
    return exact
