"""SalUn Evaluate: compares two models on the same prompts and seeds."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from salun.diffusion.context import training_session
from salun.diffusion.evaluation import compare, eval_prompts, evaluate_model
from salun.diffusion.result import grids
from salun.errors import ConfigError
from salun.progress import Stage
from salun.report.image_grid import stack
from salun.report.metrics import verdict_lines

from .execution import computes, graph_and_plan
from .families import family_of
from .images import SamplePreview, text_image, to_image
from .inputs import option_inputs, wires
from .model import GraphModel
from .progress import ComfyProgress
from .storage import cache
from .types import Concepts, Node, OptionValues

STAGES = (Stage.IMAGES_BEFORE, Stage.IMAGES_AFTER, Stage.DETECTING)


class SalUnEvaluate(Node):
    """Measures what changed between two models."""

    TITLE = "SalUn Evaluate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING", "STRING"), ("before_after", "metrics", "verdict")
    OUTPUT_TOOLTIPS = (
        "The same prompts and seeds in both models.",
        "Metrics as JSON; null where unknown.",
        "Whether the erasure worked, and what to do next.",
    )
    DESCRIPTION = (
        "Compares two models on held-out prompts: whether the concept is gone, and whether the rest stayed. Detector: "
        "the original model itself, unless SalUn Options names another. anchor_gap: 1 for the original model, 0 "
        "where the concept's prompts give the anchor's predictions. retain_change: how much the predictions of other "
        "prompts changed."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("MODEL", {"tooltip": "The original model."}),
                "after": ("MODEL", {"tooltip": "The erased model."}),
                **wires("clip", "vae", "concept"),
                **option_inputs("eval_images", "seed"),
            },
            "optional": wires("options"),
        }

    @computes
    def run(
        self,
        before: Any,
        after: Any,
        clip: Any,
        vae: Any,
        concept: Concepts,
        options: OptionValues | None = None,
        **values: Any,
    ) -> tuple[Tensor, str, str]:
        families = family_of(before).name, family_of(after).name
        if families[0] != families[1]:
            raise ConfigError(f"before is a MODEL of the family {families[0]}, but after is of {families[1]}")
        graph, plan = graph_and_plan(before, clip, vae, concept, values, options)
        graphs = graph, GraphModel(after, clip, vae, plan.options.dtype)
        prompts = eval_prompts(plan, plan.recipe.eval_images, plan.options.seed)
        bar = ComfyProgress([cost for cost in plan.stages() if cost.stage in STAGES])
        seen = []
        for graph, stage in zip(graphs, STAGES, strict=False):
            bar.preview = SamplePreview(graph, plan)
            with training_session(graph, plan):
                seen.append(evaluate_model(graph, prompts, bar, stage, cache()))
        bar.preview = None  # from here on nothing is sampled
        with training_session(graphs[0], plan):
            metrics = compare(graphs[0], plan, prompts, seen[0], seen[1], bar)
        forget, retain = grids(plan, prompts, *seen)
        image = (
            to_image(stack(forget, retain))
            if forget is not None and retain is not None
            else text_image("eval_images is 0")
        )
        facts = {"concepts": [c.name for c in plan.concepts], "images": len(prompts.forget) + len(prompts.retain)}
        summary = json.dumps({**facts, "seed": plan.options.seed, **metrics}, indent=1)
        return image, summary, "\n".join(verdict_lines(metrics))
