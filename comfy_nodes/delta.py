"""SalUn Apply Delta: an erasure at any strength on a MODEL."""

from __future__ import annotations

from typing import Any

from salun.delta import commands as deltas
from salun.delta import stacking
from salun.delta.delta import Delta
from salun.delta.stacking import STRENGTHS, AppliedDeltas, BaseMismatch
from salun.errors import ConfigError, ModelError

from .execution import computes
from .families import family_of
from .inputs import wires
from .patches import apply_delta_patch
from .paths import checkpoint_names, checkpoint_path
from .types import Node
from .weights import Weights

NO_BASE = "none"
STRENGTH = {"default": 1.0, "min": STRENGTHS[0], "max": STRENGTHS[1], "step": 0.05}


class SalUnApplyDelta(Node):
    """Applies a delta to a MODEL."""

    TITLE = "SalUn Apply Delta"
    RETURN_TYPES, RETURN_NAMES = ("MODEL",), ("model",)
    OUTPUT_TOOLTIPS = ("The model with the weight differences as patches; several deltas can follow each other.",)
    DESCRIPTION = (
        "Applies a delta to a model at a strength: 1 is the erased model, 0 the original, below 0 strengthens the "
        "concept. Deltas of one checkpoint can follow each other in any order and at any strength, and so can LoRAs. A "
        "delta of a model with patches (a LoRA, an earlier erasure) needs the same patches before it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Base of the delta, or a copy of it in another dtype."}),
                **wires("delta"),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "Scale of the weight differences."}),
            },
            "optional": {
                "base_checkpoint": (
                    [NO_BASE, *checkpoint_names()],
                    {
                        "default": NO_BASE,
                        "advanced": True,
                        "tooltip": "Base of the delta, if the model is a fine-tune of it or ComfyUI stores it in "
                        f"fp8: the differences are then added to the model. {NO_BASE}: the model is the base.",
                    },
                )
            },
        }

    @computes
    def run(self, model: Any, delta: Delta, strength: float, base_checkpoint: str = NO_BASE) -> tuple[Any]:
        family_of(model)
        if base_checkpoint == NO_BASE:
            return (apply_delta_patch(model, delta, delta_on_model(model, delta).base_tensors, strength),)
        base = deltas.open_model(str(checkpoint_path(base_checkpoint)))
        try:
            applied = stacking.stack(Weights(model, patched=False), [(delta, 1.0)], fine_tune_of_base=base)
        except BaseMismatch as error:
            raise ConfigError(
                f"is {base_checkpoint}, whose {_hashes(error)}",
                option="base_checkpoint",
                advice="Choose the checkpoint that the delta was made from",
            ) from error
        return (apply_delta_patch(model, delta, applied.base_tensors, strength),)


def delta_on_model(model: Any, delta: Delta) -> AppliedDeltas:
    """The delta on a MODEL as loaded, or with the graph's patches so far. Raises ModelError if it fits neither."""
    errors: list[ModelError] = []
    for weights in (Weights(model, patched=False), Weights(model)):
        try:
            return stacking.stack(weights, [(delta, 1.0)], known_hash=weights.hash)
        except ModelError as error:
            errors.append(error)
    if isinstance(errors[0], BaseMismatch):
        raise ModelError(
            f"this MODEL is not the delta's base: its {_hashes(errors[0])}",
            advice="If the base was a checkpoint, set SalUn Apply Delta's {base_checkpoint} to it; if it was a model "
            "with patches (a LoRA, an earlier erasure), put the same patches before this node, at the same strengths",
        ) from errors[0]
    raise errors[0]


def _hashes(error: BaseMismatch) -> str:
    return f"hash is {error.actual[:12]}…, but must be {error.expected[:12]}…"
