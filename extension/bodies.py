"""The bodies of the HTTP API's calls, for pydantic 1.10, which A1111 has, and 2."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, StrictFloat, StrictInt, StrictStr


class JobId(BaseModel, extra="forbid"):
    """The id of a job."""

    id: StrictStr


class Erase(BaseModel, extra="forbid"):
    """Erase concepts; `options` as in `schema`."""

    kind: Literal["erase"] = "erase"
    options: dict[str, Any]
    preview_every: StrictInt = 0
    name: StrictStr = ""


class Mask(BaseModel, extra="forbid"):
    """Only make the mask."""

    kind: Literal["mask"]
    options: dict[str, Any]


class Stack(BaseModel, extra="forbid"):
    """Write a checkpoint with deltas, given by the names of their runs."""

    kind: Literal["stack"]
    model: StrictStr
    deltas: list[StrictStr]
    strengths: list[StrictInt | StrictFloat]
    name: StrictStr = ""


class Undo(BaseModel, extra="forbid"):
    """Write a checkpoint without a delta."""

    kind: Literal["undo"]
    model: StrictStr
    delta: StrictStr
    name: StrictStr = ""


class Export(BaseModel, extra="forbid"):
    """Write a delta as LoRA or as full difference."""

    kind: Literal["export"]
    delta: StrictStr
    form: StrictStr = "lora"
    rank: StrictInt | None = None
    model: StrictStr | None = None


class Overlaps(BaseModel, extra="forbid"):
    """Count the weights that deltas both change."""

    kind: Literal["overlaps"]
    deltas: list[StrictStr]


class Inspect(BaseModel, extra="forbid"):
    """Show which layers a run's mask selects, or how far the masks of two runs overlap."""

    kind: Literal["inspect"]
    run: StrictStr
    against: StrictStr | None = None


class Evaluate(BaseModel, extra="forbid"):
    """Evaluate a run, by its name, or a model, by its title; `options` as under `evaluation` in `schema`."""

    kind: Literal["evaluate"]
    model: StrictStr
    options: dict[str, Any] = {}


class Attack(BaseModel, extra="forbid"):
    """Attack a run, by its name, or a model, by its title; `options` as under `attack` in `schema`."""

    kind: Literal["attack"]
    model: StrictStr
    options: dict[str, Any] = {}


class Sample(BaseModel, extra="forbid"):
    """Sample a prompt with the original of a run and at a strength of its erasure, from the same noise."""

    kind: Literal["sample"]
    run: StrictStr
    prompt: StrictStr
    strength: StrictInt | StrictFloat = 1.0
    seed: StrictInt = 0


STARTS: dict[str, type[BaseModel]] = {
    "erase": Erase, "mask": Mask, "stack": Stack, "undo": Undo, "export": Export, "overlaps": Overlaps,
    "inspect": Inspect, "evaluate": Evaluate, "attack": Attack, "sample": Sample,
}  # fmt: skip
"""Kind of job → its arguments, which are those of the method of `Requests` with that name."""
