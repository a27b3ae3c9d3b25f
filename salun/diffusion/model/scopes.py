"""Which parameters a scope selects, named as in ESD (Gandikota et al. 2023)."""

from __future__ import annotations

from torch import nn

from salun.diffusion.model.protocol import DiffusionModel
from salun.errors import ConfigError


def parameters_in_scope(model: DiffusionModel, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope.

    full; xattn (cross-attention), xattn-strict (its keys and values), selfattn, attn (both), noxattn (all but
    cross-attention, the time embedding and the output layers).

    Raises:
        ConfigError: The model has none.
    """
    selects = model.family.network.scopes.get(scope)
    chosen = {name: p for name, p in model.parameters().items() if selects is not None and selects(name)}
    if not chosen:
        raise ConfigError(
            f"is {scope!r}, which selects no parameter of this model", option="scope", advice="Use {scope} full"
        )
    return chosen
