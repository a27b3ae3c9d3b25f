"""Which parameters a scope selects, named as in ESD (Gandikota et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from salun.checkpoints.families.family import Family
from salun.diffusion.model.protocol import DiffusionModel
from salun.errors import ConfigError

T = TypeVar("T")


def parameters_in_scope(model: DiffusionModel, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope.

    full; xattn (cross-attention), xattn-strict (its keys and values), selfattn, attn (both), noxattn (all but
    cross-attention, the time embedding and the output layers).

    Raises:
        ConfigError: The model has none.
    """
    return in_scope(model.family, model.parameters(), scope)


def in_scope(family: Family, named: Mapping[str, T], scope: str) -> dict[str, T]:
    """Of what is named by parameters that of a scope, as `parameters_in_scope`."""
    selects = family.network.scopes.get(scope)
    chosen = {name: each for name, each in named.items() if selects is not None and selects(name)}
    if not chosen:
        raise ConfigError(
            f"is {scope!r}, which selects no parameter of this model", option="scope", advice="Use {scope} full"
        )
    return chosen
