"""Nodes that save masks and deltas to files and load them."""

from __future__ import annotations

from typing import Any, ClassVar

from salun.checkpoints.outputs import DELTA as DELTA_ENDING
from salun.delta.delta import Delta
from salun.masking.mask import Mask

from .inputs import filename_prefix, wires
from .paths import file_state, output_path, saved_names, saved_path, validation
from .types import DELTA, MASK, Node


class LoadNode(Node):
    """Loads a file of `output/salun` or `input`."""

    ENDINGS: ClassVar[tuple[str, ...]]
    TOOLTIP: ClassVar[str]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (saved_names(cls.ENDINGS), {"tooltip": cls.TOOLTIP})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        return file_state(file, cls.ENDINGS)


class SaveNode(Node):
    """Saves its input `WIRE` to `output/salun`."""

    OUTPUT_NODE = True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("filename",)
    OUTPUT_TOOLTIPS = ("Name of the file in output/salun.",)
    WIRE: ClassVar[str]
    PREFIX: ClassVar[str]
    ENDING: ClassVar[str]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**wires(cls.WIRE), **filename_prefix(cls.PREFIX)}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return validation(filename_prefix, "salun")

    def run(self, filename_prefix: str, **wired: Any) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "salun", self.ENDING)
        wired[self.WIRE].save(path)
        return {"ui": {"text": [f"output/salun/{name}"]}, "result": (name,)}


class SalUnLoadMask(LoadNode):
    """Loads a mask file."""

    TITLE = "SalUn Load Mask"
    RETURN_TYPES, RETURN_NAMES = (MASK,), ("mask",)
    OUTPUT_TOOLTIPS = ("Mask of the weights to train, for SalUn Erase.",)
    DESCRIPTION = "Loads a mask file of SalUn Save Mask or the command line, from output/salun or input."
    ENDINGS = ("mask.safetensors", ".mask.safetensors")
    TOOLTIP = "Mask file in output/salun or input, newest first. Press R to refresh the list."

    def run(self, file: str) -> tuple[Mask]:
        return (Mask.load(saved_path(file, self.ENDINGS)),)


class SalUnSaveMask(SaveNode):
    """Saves a mask to a file."""

    TITLE = "SalUn Save Mask"
    DESCRIPTION = "Saves a mask to output/salun, under a new name each time. The command line loads it by --mask."
    WIRE, PREFIX, ENDING = "mask", "mask", ".mask.safetensors"


class SalUnLoadDelta(LoadNode):
    """Loads a delta file."""

    TITLE = "SalUn Load Delta"
    RETURN_TYPES, RETURN_NAMES = (DELTA,), ("delta",)
    OUTPUT_TOOLTIPS = ("The weight differences, for SalUn Apply Delta and the nodes that save an erasure.",)
    DESCRIPTION = (
        "Loads a *.salun.safetensors file of SalUn Save Delta or the command line, from output/salun or input."
    )
    ENDINGS = (DELTA_ENDING,)
    TOOLTIP = "Delta file in output/salun or input, newest first. Press R to refresh the list."

    def run(self, file: str) -> tuple[Delta]:
        return (Delta.load(saved_path(file, self.ENDINGS)),)


class SalUnSaveDelta(SaveNode):
    """Saves a delta to a file."""

    TITLE = "SalUn Save Delta"
    DESCRIPTION = (
        "Saves a delta to output/salun, under a new name each time. Anyone who has the delta can undo the erasure: to "
        "keep a concept erased, publish the checkpoint instead."
    )
    WIRE, PREFIX, ENDING = "delta", "erased", DELTA_ENDING
