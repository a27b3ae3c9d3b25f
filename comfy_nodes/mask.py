"""SalUn's masks in a graph: found, kept, combined, looked at."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from salun.cache import key_of
from salun.diffusion.data import sample_data
from salun.diffusion.erase import find_mask, prepared
from salun.errors import ConfigError
from salun.mask import Mask
from salun.report.picture import densities

from .inputs import inputs, options_of
from .kinds import CONCEPT, DATA, MASK, Concepts, Data
from .model import GraphModel
from .places import cache, chosen, output_path, saved
from .progress import Bar
from .work import computes, facts_of, image, plan_of, stages

ENDINGS = ("mask.safetensors", ".mask.safetensors")


class SalUnSaliencyMask:
    """Which weights may move."""

    CATEGORY, FUNCTION = "SalUn", "make"
    RETURN_TYPES, RETURN_NAMES = (MASK, "STRING"), ("mask", "told")
    OUTPUT_TOOLTIPS = ("For SalUn Erase.", "How many weights it selects, and what is odd about them.")
    DESCRIPTION = (
        "The weights that matter most to the concept: signed gradients of its loss are summed, and the largest share "
        "of all weights, ranked together, may move. The other choices of mask are controls."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that will be erased, with the patches it has in the graph."}),
                "clip": ("CLIP", {"tooltip": "Encodes the concept's prompts."}),
                "concept": (CONCEPT, {"tooltip": "From SalUn Concept."}),
                **inputs("density", "mask", "scope", "seed"),
            },
            "optional": {
                "data": (DATA, {"tooltip": "From SalUn Training Data; without it forget samples are made here."}),
                **inputs("combine", "guidance", "batch_size", "forget_latents", "resolution", advanced=True),
                **inputs("prompt_style", "negative_prompt", "clip_skip", "recipe", advanced=True),
                **inputs("dtype", "low_vram", "gradient_checkpointing", "deterministic", advanced=True),
            },
        }

    @computes
    def make(
        self, model: Any, clip: Any, concept: Concepts, data: Data | None = None, **given: Any
    ) -> tuple[Mask, str]:
        options = options_of(given)
        graph = GraphModel(model, clip, dtype=options.dtype)
        plan = plan_of(graph, concept, options)
        check_data(data, concept)
        bar = Bar(stages(plan, data, train=False))
        key = key_of(what="comfy mask", data=data.digest if data else None, **facts_of(graph, plan))
        kept = cache().folder / key[:2] / f"{key}-mask.safetensors"
        if kept.is_file() and cache().limit:
            mask = Mask.load(kept)
        else:
            with prepared(graph, plan):
                lent = data.on(graph.device) if data else sample_data(graph, plan, bar, True, cache())
                mask, told = find_mask(graph, lent, plan, bar)
            mask = Mask(mask.bits, mask.shapes, {**mask.metadata, "warnings": "; ".join(told["warnings"])})
            if cache().limit:
                mask.save(kept)
        return mask, summary(mask)


class SalUnLoadMask:
    """A mask file."""

    CATEGORY, FUNCTION = "SalUn", "load"
    RETURN_TYPES, RETURN_NAMES = (MASK,), ("mask",)
    OUTPUT_TOOLTIPS = ("For SalUn Erase.",)
    DESCRIPTION = "A mask that SalUn Save Mask or the command line wrote, from output/salun or ComfyUI's input folder."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (saved("salun", ENDINGS), {"tooltip": "Press R to refresh the list."})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        return _digest(file)

    def load(self, file: str) -> tuple[Mask]:
        return (Mask.load(chosen(file, "salun", ENDINGS)),)


class SalUnSaveMask:
    """A mask to a file."""

    CATEGORY, FUNCTION, OUTPUT_NODE = "SalUn", "save", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("file",)
    OUTPUT_TOOLTIPS = ("The file's name in output/salun.",)
    DESCRIPTION = "Writes a mask to output/salun, under a new name each time. The command line reads it with --mask."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mask": (MASK, {"tooltip": "From SalUn Saliency Mask."}),
                "filename_prefix": ("STRING", {"default": "mask", "tooltip": "The beginning of the file's name."}),
            }
        }

    def save(self, mask: Mask, filename_prefix: str) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "salun", ".mask.safetensors")
        mask.save(path)
        return {"ui": {"text": [f"output/salun/{name}"]}, "result": (name,)}


class SalUnCombineMasks:
    """Set operations."""

    CATEGORY, FUNCTION = "SalUn", "combine"
    RETURN_TYPES, RETURN_NAMES = (MASK, "STRING"), ("mask", "told")
    OUTPUT_TOOLTIPS = ("Of the same model.", "How many weights it selects, and how alike the two are.")
    DESCRIPTION = "Two masks of one model as one: weights of either, of both, or of the first alone."
    OPERATIONS = ("union", "intersection", "first without second")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "first": (MASK, {"tooltip": "A mask."}),
                "second": (MASK, {"tooltip": "Another mask of the same model."}),
                "operation": (list(cls.OPERATIONS), {"tooltip": "Which weights the new mask selects."}),
            }
        }

    def combine(self, first: Mask, second: Mask, operation: str) -> tuple[Mask, str]:
        hashes = {mask.metadata.get("base_hash") for mask in (first, second)} - {None}
        if len(hashes) > 1:
            raise ConfigError("the two masks were made from different models: combine masks of one model")
        made = {"union": first | second, "intersection": first & second}.get(operation)
        made = made if made is not None else first - second
        same = {k: v for k, v in first.metadata.items() if second.metadata.get(k) == v}
        mask = Mask(made.bits, made.shapes, {**same, "method": operation})
        return mask, f"{summary(mask)}; Jaccard of the two {first.jaccard(second):.4f}"


class SalUnMaskHeatmap:
    """A mask to look at."""

    CATEGORY, FUNCTION = "SalUn", "draw"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("Density of each block (down) and kind of layer (across).",)
    DESCRIPTION = "How many of each layer's weights a mask selects, as a picture."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"mask": (MASK, {"tooltip": "From SalUn Saliency Mask or Load Mask."})}}

    def draw(self, mask: Mask) -> tuple[Tensor]:
        counts = mask.counts()
        sizes = {
            name: (counts[name], total) for name, total in zip(counts, map(_size, mask.shapes.values()), strict=True)
        }
        return (image(densities(sizes)),)


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def summary(mask: Mask) -> str:
    """A mask in one line."""
    odd = mask.metadata.get("warnings", "")
    return f"{mask.selected:,} of {mask.total:,} weights ({mask.density:.2%})" + (f"; {odd}" if odd else "")


def digest(mask: Mask) -> str:
    """A hash of what a mask selects."""
    found = hashlib.sha256()
    for name, row in mask.bits.items():
        found.update(f"{name}\0".encode())
        found.update(row.data)
    return found.hexdigest()


def check_data(data: Data | None, concept: Concepts) -> None:
    """Raises ConfigError for training data of other concepts."""
    names = tuple(one.name for one in concept)
    if data is not None and data.names != names:
        raise ConfigError(f"the training data are of {', '.join(data.names)}, the concept is {', '.join(names)}")


def _digest(file: str) -> str:
    try:
        path = chosen(file, "salun", ENDINGS)
    except ConfigError:
        return "gone"
    facts = path.stat()
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"
