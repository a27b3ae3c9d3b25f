"""SalUn Concept: words only."""

from __future__ import annotations

from typing import Any

from salun.diffusion.prompts.concepts import Concept, presets
from salun.errors import ConfigError

from .kinds import CONCEPT, Concepts, Node

TEXT = "(text)"
EMPTY = '""'


class SalUnConcept(Node):
    """What to forget, what it becomes, what to keep."""

    RETURN_TYPES, RETURN_NAMES = (CONCEPT,), ("concept",)
    OUTPUT_TOOLTIPS = ("One concept, or several in a row.",)
    DESCRIPTION = "What a model should forget: a preset or any text, what it becomes, and prompts to keep as they are."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "preset": (
                    [TEXT, *presets()],
                    {
                        "default": TEXT,
                        "tooltip": f"A preset knows synonyms, anchors and prompts to keep. {TEXT}: below.",
                    },
                ),
                "text": (
                    "STRING",
                    {"default": "", "tooltip": f"What to forget, in your own words, where preset is {TEXT}."},
                ),
                "anchor": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "What the concept becomes. Empty: the preset's own anchors (for a text, the empty "
                        f"prompt). Two quotes ({EMPTY}): the empty prompt.",
                    },
                ),
                "retain_prompts": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Prompts to keep, added to the default ones; one a line.",
                    },
                ),
            },
            "optional": {
                "concept": (CONCEPT, {"tooltip": "Concepts to forget as well: several go into one erasure."}),
            },
        }

    def run(self, preset: str, text: str, anchor: str, retain_prompts: str, concept: Concepts = ()) -> tuple[Concepts]:
        name = text.strip() if preset == TEXT else preset
        if not name:
            raise ConfigError(f"SalUn Concept: choose a preset, or write what to forget into text (preset is {TEXT})")
        if preset != TEXT and text.strip():
            raise ConfigError(
                f"SalUn Concept: both the preset {preset!r} and a text are given; for the text choose {TEXT}"
            )
        becomes = None if not anchor.strip() else "" if anchor.strip() == EMPTY else anchor.strip()
        keep = tuple(line.strip() for line in retain_prompts.splitlines() if line.strip())
        return ((*concept, Concept(name, becomes, keep)),)
