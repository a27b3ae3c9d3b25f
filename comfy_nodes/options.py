"""SalUn Options: the less common options, for all nodes that it is connected to."""

from __future__ import annotations

from typing import Any

from .inputs import SHARED, explicit, option_inputs
from .types import OPTIONS, Node, OptionValues


class SalUnOptions(Node):
    """The core's options that no other node has."""

    TITLE = "SalUn Options"
    RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
    OUTPUT_TOOLTIPS = ("For SalUn Training Data, Saliency Mask, Erase and Evaluate: connect it to all of them.",)
    DESCRIPTION = (
        "Less common options: samples, resolution, prompts, losses, memory. Without this node the defaults apply. "
        "Connect it to every node of an erasure, so that their options agree."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": option_inputs(*SHARED)}  # optional: a prompt need not name them all

    def run(self, **values: Any) -> tuple[OptionValues]:
        return (explicit(values),)
