"""SalUn Concept: names what is erased."""

from __future__ import annotations

from typing import Any

from salun.diffusion.prompts.concepts import Concept, presets
from salun.errors import ConfigError

from .types import CONCEPT, Concepts, Node

TEXT = "(text)"
EMPTY = '""'


class SalUnConcept(Node):
    """The concept to erase, its anchor, and prompts to retain."""

    TITLE = "SalUn Concept"
    RETURN_TYPES, RETURN_NAMES = (CONCEPT,), ("concept",)
    OUTPUT_TOOLTIPS = ("The concept, after those of the concept input.",)
    DESCRIPTION = "The concept to erase (a preset or any text), its anchor, and prompts to retain."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def text(tooltip: str, **settings: Any) -> tuple[str, dict[str, Any]]:
            return "STRING", {"default": "", **settings, "tooltip": tooltip}

        return {
            "required": {
                "preset": (
                    [TEXT, *presets()],
                    {
                        "default": TEXT,
                        "tooltip": f"A preset has synonyms, anchors and retain prompts. {TEXT}: use the text below.",
                    },
                ),
                "text": text(f"The concept to erase, where preset is {TEXT}."),
                "anchor": text(
                    "What the erased model shows in place of the concept. Empty: the preset's anchors (for a text, the "
                    f"empty prompt). Two quotation marks ({EMPTY}): the empty prompt."
                ),
                "retain_prompts": text("Prompts to retain, added to the default ones; one per line.", multiline=True),
            },
            "optional": {
                "concept": (CONCEPT, {"tooltip": "Concepts to erase as well, in the same erasure."}),
            },
        }

    def run(self, preset: str, text: str, anchor: str, retain_prompts: str, concept: Concepts = ()) -> tuple[Concepts]:
        name = text.strip() if preset == TEXT else preset
        if not name:
            raise ConfigError(f"SalUn Concept has no concept: choose a preset, or enter a text (preset is {TEXT})")
        if preset != TEXT and text.strip():
            raise ConfigError(
                f"SalUn Concept has both the preset {preset!r} and a text: clear the text, or set preset to {TEXT}"
            )
        anchor = anchor.strip()
        retain = tuple(line.strip() for line in retain_prompts.splitlines() if line.strip())
        return ((*concept, Concept(name, None if not anchor else "" if anchor == EMPTY else anchor, retain)),)
