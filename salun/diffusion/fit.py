"""Options with which an erasure fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from salun.diffusion.model.loading import ModelSpec
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan
from salun.diffusion.simulate import simulate
from salun.options import from_mapping
from salun.runs.cache import Cache

MARGIN = 2**30  # bytes that a GPU's libraries and the gaps of its allocator take, about
FITTED = ("gradient_checkpointing", "low_vram", "batch_size")  # options that may change, in this order


@dataclass(frozen=True)
class Fit:
    """How an erasure fits.

    Args:
        changes: Options that it needs beyond those given, by name; empty where it fits as it is, or never.
        text: That for people; "" where it fits as it is.
        fits: Whether it does, with the changes.
    """

    changes: Mapping[str, Any]
    text: str
    fits: bool


def fit(
    free: int,
    spec: ModelSpec,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    cache: Cache | None = None,
    *,
    batch_size: int | None = None,
) -> Fit:
    """The first options with which a plan fits: gradient checkpointing, then `low_vram`, then smaller batches too.

    Args:
        free: Bytes that are free on the device.
        spec, plan, device, dtype, cache: As of `simulate`.
        batch_size: The one that is wanted; None for any.

    Raises:
        ModelError: No model can be built from what the files say.
    """
    free -= MARGIN if device.type == "cuda" else 0
    needed = simulate(spec, plan, device, dtype, cache).most
    if needed <= free:
        return Fit({}, "", True)
    text, still = f"it needs about {_gib(needed)} of memory, and {_gib(free)} are free", ""
    for changes in _tried(plan, batch_size):
        least = simulate(spec, _with(plan, changes), device, dtype, cache).most
        names = " and ".join(name if value is True else f"{name} {value}" for name, value in changes.items())
        if least <= free:
            return Fit(changes, f"{text}: {names} needs {_gib(least)}", True)
        still = f"; with {names} it still needs {_gib(least)}"
    return Fit({}, text + still, False)


def _tried(plan: Plan, batch_size: int | None) -> Iterator[dict[str, Any]]:
    batch = plan.recipe.batch_size
    if not plan.options.low_vram:
        if not plan.options.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        yield {"low_vram": True}
    while batch_size is None and batch > 1:
        batch //= 2
        yield {"low_vram": True, "batch_size": batch}


def _with(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    batch = changes.get("batch_size", plan.recipe.batch_size)
    return replace(plan, options=replace(plan.options, **changes), recipe=replace(plan.recipe, batch_size=batch))


def as_recorded(options: EraseOptions, recorded: Mapping[str, Any]) -> EraseOptions:
    """Options with what was changed when a run began, which continues.

    Args:
        recorded: The options of its record, which may be untrusted input; ConfigError for values they cannot have.
    """
    defaults = EraseOptions()
    unset = [name for name in FITTED if getattr(options, name) == getattr(defaults, name)]
    changed = {name: recorded[name] for name in unset if recorded.get(name) is not None}
    known = from_mapping(EraseOptions, changed, "run.json")
    return replace(options, **{name: getattr(known, name) for name in changed})


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
