"""Masks in a graph: computed, combined and shown."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from salun.diffusion.context import training_session
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.masks import find_mask
from salun.diffusion.stages import mask_stages
from salun.errors import ConfigError
from salun.masking.mask import Mask
from salun.report.image_grid import densities

from .data import check_data
from .execution import computes, graph_and_plan, load_cached_mask, run_record, save_cached_mask
from .images import SamplePreview, to_image
from .inputs import option_inputs, options_validation, wires
from .progress import ComfyProgress
from .storage import cache
from .types import MASK, Concepts, Data, Node, OptionValues, data_on


class SalUnSaliencyMask(Node):
    """Selects the weights that are trained."""

    TITLE = "SalUn Saliency Mask"
    RETURN_TYPES, RETURN_NAMES = (MASK, "STRING"), ("mask", "summary")
    OUTPUT_TOOLTIPS = ("Mask of the weights to train, for SalUn Erase.", "Number of selected weights, and warnings.")
    DESCRIPTION = (
        "Selects the weights that matter most to the concept: those with the largest sums of signed gradients of its "
        "loss, ranked over the whole network. The last three choices of mask are controls."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Model to erase from, with its patches in the graph."}),
                **wires("clip", "concept"),
                **option_inputs("density", "seed", "mask", "batch_size", advanced=("mask", "batch_size")),
            },
            "optional": wires("data", "options"),
        }

    @classmethod
    def VALIDATE_INPUTS(cls, batch_size: str | None = None) -> bool | str:
        return options_validation(batch_size=batch_size)

    @computes
    def run(
        self,
        model: Any,
        clip: Any,
        concept: Concepts,
        data: Data | None = None,
        options: OptionValues | None = None,
        **values: Any,
    ) -> tuple[Mask, str]:
        graph, plan = graph_and_plan(model, clip, None, concept, values, options)
        check_data(data, graph, plan)
        key = run_record("mask", graph, plan, data).fingerprint
        mask = load_cached_mask(cache(), key)
        if mask is None:
            samples = data is None and plan.by_saliency
            content = data.content if data is not None else None
            bar = ComfyProgress(mask_stages(plan, content), SamplePreview(graph, plan))
            with training_session(graph, plan):
                if samples:
                    content = build_training_set(graph, plan, bar, "all" if plan.by_ratio else "forget", cache())
                elif content is not None:
                    content = data_on(content, graph.device)
                result = find_mask(graph, content, plan, bar)
            mask = result.mask
            mask = Mask(mask.bits, mask.shapes, {**mask.metadata, "warnings": "; ".join(result.warnings)})
            save_cached_mask(cache(), key, mask)
        return mask, summary(mask)


class SalUnCombineMasks(Node):
    """Combines two masks by a set operation."""

    TITLE = "SalUn Combine Masks"
    RETURN_TYPES, RETURN_NAMES = (MASK, "STRING"), ("mask", "summary")
    OUTPUT_TOOLTIPS = ("The combined mask.", "Number of selected weights, and the Jaccard index of the two masks.")
    DESCRIPTION = "Combines two masks of one model: the weights of either, of both, or of the first alone."
    OPERATIONS = ("union", "intersection", "first without second")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "first": (MASK, {"tooltip": "First mask."}),
                "second": (MASK, {"tooltip": "Second mask, of the same model."}),
                "operation": (
                    list(cls.OPERATIONS),
                    {
                        "default": cls.OPERATIONS[0],
                        "tooltip": "Weights of the new mask: of either mask, of both, or of the first alone.",
                    },
                ),
            }
        }

    def run(self, first: Mask, second: Mask, operation: str) -> tuple[Mask, str]:
        hashes = {mask.metadata.get("base_hash") for mask in (first, second)} - {None}
        if len(hashes) > 1:
            raise ConfigError("the two masks are of different models", advice="Combine masks of one model")
        combined = {"union": first | second, "intersection": first & second}.get(operation)
        combined = combined if combined is not None else first - second
        shared = {k: v for k, v in first.metadata.items() if second.metadata.get(k) == v}
        mask = Mask(combined.bits, combined.shapes, {**shared, "method": operation})
        return mask, f"{summary(mask)}; Jaccard index of the two: {first.jaccard(second):.4f}"


class SalUnMaskHeatmap(Node):
    """Shows a mask's density by layer."""

    TITLE = "SalUn Mask Heatmap"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("Density by block (rows) and type of layer (columns).",)
    DESCRIPTION = "Shows the density of a mask in each layer as an image."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": wires("mask")}

    def run(self, mask: Mask) -> tuple[Tensor]:
        return (to_image(densities({name: (n, prod(mask.shapes[name])) for name, n in mask.counts().items()})),)


def summary(mask: Mask) -> str:
    """A mask in one line: its selected weights and its warnings."""
    warnings = mask.metadata.get("warnings", "")
    return f"{mask.selected:,} of {mask.total:,} weights ({mask.density:.2%})" + (f"; {warnings}" if warnings else "")
