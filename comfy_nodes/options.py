"""SalUn Options: all that is seldom changed, once for the nodes that it is wired to."""

from __future__ import annotations

from typing import Any

from .inputs import SHARED, chosen_of, inputs
from .kinds import OPTIONS, Chosen, Node


class SalUnOptions(Node):
    """The core's options that no other node has."""

    RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
    OUTPUT_TOOLTIPS = ("For SalUn Training Data, Saliency Mask, Erase and Evaluate: wire one to all of them.",)
    DESCRIPTION = (
        "All that is seldom changed: samples, resolution, how prompts are read, losses, memory. Without this node "
        "the defaults hold. Wire one to all nodes of an erasure, so that they agree."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": inputs(*SHARED)}  # so that a prompt need not name them all

    def run(self, **given: Any) -> tuple[Chosen]:
        return (chosen_of(given),)
