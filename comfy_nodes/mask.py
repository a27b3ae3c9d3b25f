"""SalUn's masks in a graph: found, kept, combined, looked at."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from salun.diffusion.context import prepared
from salun.diffusion.data.training_set import sample_data
from salun.diffusion.masks import find_mask
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, MaskError
from salun.masking.mask import Mask
from salun.report.picture import densities

from .inputs import inputs, options_of, prefix, wires
from .kinds import DATA, MASK, Chosen, Concepts, Data, Node
from .model import GraphModel, as_started
from .places import cache, chosen, output_path, saved, state_of, validated
from .progress import ComfyProgress
from .work import Sampled, computes, digest, image, plan_of, record_of, saliency_steps, samples_drawn, text_of

ENDINGS = ("mask.safetensors", ".mask.safetensors")


class SalUnSaliencyMask(Node):
    """Which weights may move."""

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
                **wires("clip", "concept"),
                **inputs("density", "mask", "batch_size", "seed"),
            },
            "optional": {
                "data": (DATA, {"tooltip": "From SalUn Training Data; without it forget samples are made here."}),
                **wires("options"),
            },
        }

    @computes
    def run(
        self,
        model: Any,
        clip: Any,
        concept: Concepts,
        data: Data | None = None,
        options: Chosen | None = None,
        **given: Any,
    ) -> tuple[Mask, str]:
        wanted = as_started(options_of(given, options))
        graph = GraphModel(model, clip, dtype=wanted.dtype)
        plan = plan_of(graph, concept, wanted)
        check_data(data, graph, plan)
        key = record_of("mask", graph, plan, data).fingerprint
        mask = cache().load(key, _kept)
        if mask is None:
            sampled = samples_drawn(plan, forget_only=True) if data is None and plan.by_saliency else 0
            bar = ComfyProgress({"sampling": sampled, "saliency": saliency_steps(plan, data)}, Sampled(graph, plan))
            with prepared(graph, plan):
                lent = data.on(graph.device) if data is not None else None
                if sampled:
                    lent = sample_data(graph, plan, bar, True, cache())
                mask, told = find_mask(graph, lent, plan, bar)
            mask = Mask(mask.bits, mask.shapes, {**mask.metadata, "warnings": "; ".join(told["warnings"])})
            held = Mask(mask.bits, mask.shapes, {**mask.metadata, DIGEST: digest(mask)})
            cache().save(key, sum(row.nbytes for row in mask.bits.values()), held.save)
        return mask, summary(mask)


DIGEST = "digest"  # in the metadata of a mask that is kept


def _kept(path: Path) -> Mask:
    """A mask that was kept. Raises MaskError for one whose content is not what was written."""
    held = Mask.load(path)
    mask = Mask(held.bits, held.shapes, {name: text for name, text in held.metadata.items() if name != DIGEST})
    if held.metadata.get(DIGEST) != digest(mask):
        raise MaskError(f"{path} is damaged: its content is not what was written")
    return mask


class SalUnLoadMask(Node):
    """A mask file."""

    RETURN_TYPES, RETURN_NAMES = (MASK,), ("mask",)
    OUTPUT_TOOLTIPS = ("For SalUn Erase.",)
    DESCRIPTION = "A mask that SalUn Save Mask or the command line wrote, from output/salun or ComfyUI's input folder."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (saved("salun", ENDINGS), {"tooltip": "Press R to refresh the list."})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        return state_of(file, ENDINGS)

    def run(self, file: str) -> tuple[Mask]:
        return (Mask.load(chosen(file, "salun", ENDINGS)),)


class SalUnSaveMask(Node):
    """A mask to a file."""

    OUTPUT_NODE = True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("file",)
    OUTPUT_TOOLTIPS = ("The file's name in output/salun.",)
    DESCRIPTION = "Writes a mask to output/salun, under a new name each time. The command line reads it with --mask."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mask": (MASK, {"tooltip": "From SalUn Saliency Mask."}),
                **prefix("mask"),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return validated(filename_prefix, "salun")

    def run(self, mask: Mask, filename_prefix: str) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "salun", ".mask.safetensors")
        mask.save(path)
        return {"ui": {"text": [f"output/salun/{name}"]}, "result": (name,)}


class SalUnCombineMasks(Node):
    """Set operations."""

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

    def run(self, first: Mask, second: Mask, operation: str) -> tuple[Mask, str]:
        hashes = {mask.metadata.get("base_hash") for mask in (first, second)} - {None}
        if len(hashes) > 1:
            raise ConfigError("the two masks were made from different models: combine masks of one model")
        made = {"union": first | second, "intersection": first & second}.get(operation)
        made = made if made is not None else first - second
        same = {k: v for k, v in first.metadata.items() if second.metadata.get(k) == v}
        mask = Mask(made.bits, made.shapes, {**same, "method": operation})
        return mask, f"{summary(mask)}; Jaccard of the two {first.jaccard(second):.4f}"


class SalUnMaskHeatmap(Node):
    """A mask to look at."""

    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("Density of each block (down) and kind of layer (across).",)
    DESCRIPTION = "How many of each layer's weights a mask selects, as a picture."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"mask": (MASK, {"tooltip": "From SalUn Saliency Mask or Load Mask."})}}

    def run(self, mask: Mask) -> tuple[Tensor]:
        return (image(densities({name: (n, prod(mask.shapes[name])) for name, n in mask.counts().items()})),)


def summary(mask: Mask) -> str:
    """A mask in one line."""
    odd = mask.metadata.get("warnings", "")
    return f"{mask.selected:,} of {mask.total:,} weights ({mask.density:.2%})" + (f"; {odd}" if odd else "")


def check_data(data: Data | None, graph: GraphModel, plan: Plan) -> None:
    """Raises ConfigError for training data of other concepts, prompts or sizes, or of a model of another family."""
    if data is None:
        return
    names, anchors = [c.name for c in plan.concepts], [c.anchor for c in plan.concepts]
    if list(data.names) != names:
        raise ConfigError(f"the training data are of {', '.join(data.names)}, the concept is {', '.join(names)}")
    if list(data.anchors) != anchors:
        raise ConfigError(
            f"the training data have the anchors {data.anchors}, concept has {tuple(anchors)}: wire one concept to "
            "SalUn Training Data and to this node"
        )
    if data.family != graph.family.name:
        raise ConfigError(
            f"the training data were made with a model of the family {data.family}, this model is {graph.family}: "
            "wire one model to SalUn Training Data and to this node"
        )
    theirs = data.content.forget_latents.shape[-1] * 8
    ours = graph.settings_with(plan.options).sampling.resolution
    if theirs != ours:
        raise ConfigError(
            f"the training data are of resolution {theirs}, options here of {ours}: wire one SalUn Options to SalUn "
            "Training Data and to this node"
        )
    if data.prompts != plan.prompts.digest:
        raise ConfigError(
            "the training data are of other prompts: wire one concept (its retain_prompts) and one SalUn Options (its "
            "prompt_style) to SalUn Training Data and to this node"
        )
    if data.text != text_of(graph, plan):
        raise ConfigError(
            "the training data were read by another CLIP: wire one CLIP and one SalUn Options (its clip_skip and "
            "negative_prompt) to SalUn Training Data and to this node"
        )
