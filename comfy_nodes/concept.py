"""SalUn Concept: names what is erased."""

from __future__ import annotations

from typing import Any

from salun.diffusion.prompts.concepts import Concept, presets
from salun.errors import ConfigError

from .inputs import AUTO
from .types import CONCEPT, Concepts, Node

CUSTOM = "custom"


class SalUnConcept(Node):
    """The concept to erase, its anchor, and prompts to retain."""

    TITLE = "SalUn Concept"
    RETURN_TYPES, RETURN_NAMES = (CONCEPT,), ("concept",)
    OUTPUT_TOOLTIPS = ("The concept, after those of the input concept.",)
    DESCRIPTION = (
        "The concept to erase (a preset or any text), its anchor, which the erased model shows in its place, and "
        "prompts to retain. To erase several concepts in one erasure, connect one SalUn Concept to the next."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def text(tooltip: str, **settings: Any) -> tuple[str, dict[str, Any]]:
            return "STRING", {"default": "", **settings, "tooltip": tooltip}

        return {
            "required": {
                "preset": (
                    [CUSTOM, *presets()],
                    {
                        "default": CUSTOM,
                        "tooltip": f"Concept with synonyms, anchors and retain prompts. {CUSTOM}: the text below.",
                    },
                ),
                "text": text(f"Concept to erase, where preset is {CUSTOM}."),
                "anchor": text(
                    "What the erased model shows in place of the concept; an empty text is the empty prompt. "
                    f"{AUTO}: the preset's anchors; for a text, the empty prompt.",
                    default=AUTO,
                ),
                "retain_prompts": text("Prompts to retain, added to the default ones; one per line.", multiline=True),
            },
            "optional": {
                "concept": (CONCEPT, {"tooltip": "Concepts to erase as well, from another SalUn Concept."}),
            },
        }

    def run(self, preset: str, text: str, anchor: str, retain_prompts: str, concept: Concepts = ()) -> tuple[Concepts]:
        name = text.strip() if preset == CUSTOM else preset
        if not name:
            raise ConfigError(f"SalUn Concept has no concept: choose a preset, or enter a text (preset is {CUSTOM})")
        if preset != CUSTOM and text.strip():
            raise ConfigError(
                f"SalUn Concept has both the preset {preset!r} and a text: clear the text, or set preset to {CUSTOM}"
            )
        retain = tuple(line.strip() for line in retain_prompts.splitlines() if line.strip())
        return ((*concept, Concept(name, None if anchor.strip() == AUTO else anchor.strip(), retain)),)
