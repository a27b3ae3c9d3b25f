"""Which parameters a scope selects (ESD's names)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from salun.errors import ConfigError


def parameters_in_scope(parameters: Mapping[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope, in ESD's words.

    full; xattn (attn2); selfattn (attn1); noxattn (all but attn2, the time embedding and the output layers, which ESD
    leaves out too).
    """
    tests: dict[str, Callable[[str], bool]] = {
        "full": lambda n: True,
        "xattn": lambda n: ".attn2." in n,
        "selfattn": lambda n: ".attn1." in n,
        "noxattn": lambda n: (
            ".attn2." not in n and not n.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
        ),
    }
    chosen = {name: p for name, p in parameters.items() if tests[scope](name)}
    if not chosen:
        raise ConfigError(f"--scope {scope} names no parameter of this model")
    return chosen
