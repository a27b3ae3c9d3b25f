"""Options with which an erasure fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from salun.diffusion.model.loading import ModelSpec
from salun.diffusion.model.settings import ModelSettings
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import ConceptSpec, Plan, make_plan
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
        text: What it needs, and what it needs with them; "" where it fits as it is.
    """

    changes: Mapping[str, Any]
    text: str


def fit(
    free: int,
    spec: ModelSpec,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    cache: Cache | None = None,
    *,
    batch_size: int | None = None,
    processes: int = 1,
) -> Fit:
    """The first options with which a plan fits: gradient checkpointing, then `low_vram`, then smaller batches too.

    Args:
        free: Bytes that are free on the device.
        spec, plan, device, dtype, cache: As of `simulate`.
        batch_size: The one that is wanted; None for any.
        processes: That share the batch, whose size does not change then.

    Raises:
        ModelError: No model can be built from what the files say.
    """
    free -= MARGIN if device.type == "cuda" else 0
    needed = simulate(spec, plan, device, dtype, cache, processes).most
    if needed <= free:
        return Fit({}, "")
    beyond = f", beyond {_gib(MARGIN)} for libraries" if device.type == "cuda" else ""
    text, still = f"it needs about {_gib(needed)} of memory, and {_gib(max(free, 0))} are free{beyond}", ""
    for changes in _tried(plan, batch_size if processes == 1 else plan.recipe.batch_size):
        least = simulate(spec, _with(plan, changes), device, dtype, cache, processes).most
        if least <= free:
            return Fit(changes, f"{text}; with {_named(changes)} it needs {_gib(least)}")
        still = f"; with {_named(changes)} it still needs {_gib(least)}"
    return Fit({}, text + still)


def _named(changes: Mapping[str, Any]) -> str:
    return " and ".join(name if value is True else f"{name} {value}" for name, value in changes.items())


@dataclass(frozen=True)
class Fitted:
    """A plan that fits, as far as any does.

    Args:
        note: Which options were changed for that, and why; "" for none.
        warning: Why it may not fit all the same; "" where it does.
    """

    plan: Plan
    note: str = ""
    warning: str = ""

    @property
    def notes(self) -> list[str]:
        """For the record."""
        warning = f"memory may not suffice: {self.warning}" if self.warning else ""
        return [line for line in (self.note, warning) if line]


def fitted_plan(
    settings: ModelSettings,
    model: str,
    wanted: ConceptSpec,
    options: EraseOptions,
    fit_of: Callable[[Plan], Fit],
    recorded: Mapping[str, Any] | None = None,
) -> Fitted:
    """The plan of an erasure, with options that make it fit, unless they are to stay as given.

    Args:
        settings, model, wanted, options: As of `make_plan`.
        fit_of: How a plan fits into the memory that is free.
        recorded: The options of the record of a run that continues, which keeps those to which it was fitted; may be
            untrusted input.

    Raises:
        ConfigError: As `make_plan`; an option in the record has a value that it cannot have.
    """
    plan = make_plan(settings, model, wanted, options)
    if options.as_given:
        return Fitted(plan, warning=fit_of(plan).text)
    if recorded is not None:
        continued = make_plan(settings, model, wanted, as_recorded(options, recorded))
        now, before = ({name: getattr(of.options, name) for name in FITTED} for of in (continued, plan))
        changes = {name: value for name, value in now.items() if value != before[name]}
        note = f"the run continues with {_named(changes)}, to which it was fitted when it began" if changes else ""
        return Fitted(continued, note, fit_of(continued).text)
    needed = fit_of(plan)
    if not needed.changes:
        return Fitted(plan, warning=needed.text)
    changed = make_plan(settings, model, wanted, replace(options, **needed.changes))
    return Fitted(changed, f"to fit into the GPU's memory, the run takes {_named(needed.changes)}: {needed.text}")


def _tried(plan: Plan, batch_size: int | None) -> Iterator[dict[str, Any]]:
    batch = plan.recipe.batch_size
    if not plan.options.low_vram:
        if not plan.options.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        yield {"low_vram": True}
    while batch_size is None and batch > 1 and "batch_size" in plan.method.reads:
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
