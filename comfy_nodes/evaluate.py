"""SalUn Evaluate: two models under the same questions."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from salun.diffusion.context import prepared
from salun.diffusion.evaluation import Evaluation, compare, observe, questions
from salun.diffusion.result import grids
from salun.errors import ConfigError
from salun.progress import Stage
from salun.report.picture import stack

from .inputs import inputs, options_of, wires
from .kinds import Chosen, Concepts, Node
from .model import GraphModel, as_started, family_of
from .places import cache
from .progress import ComfyProgress
from .work import Sampled, computes, image, plan_of, written


class SalUnEvaluate(Node):
    """What changed between two models."""

    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("before_after", "figures")
    OUTPUT_TOOLTIPS = ("The same prompts and seeds in both models.", "Figures as JSON; null where one is not known.")
    DESCRIPTION = (
        "Shows and measures two models on prompts that no training saw. anchor_gap: 1 where nothing happened, 0 where "
        "the concept's prompts are answered as the anchor's were. retain_change: how much the rest moved."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("MODEL", {"tooltip": "The model as it was."}),
                "after": ("MODEL", {"tooltip": "The erased model."}),
                **wires("clip", "vae", "concept"),
                **inputs("eval_images", "seed"),
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
        options: Chosen | None = None,
        **given: Any,
    ) -> tuple[Tensor, str]:
        families = family_of(before), family_of(after)
        if families[0] != families[1]:
            raise ConfigError(f"before is a MODEL of {families[0]}, after one of {families[1]}: only one kind compares")
        wanted = as_started(options_of(given, options))
        plan, asked, seen = None, None, []
        n = 0
        for model, stage in ((before, Stage.IMAGES_BEFORE), (after, Stage.IMAGES_AFTER)):
            graph = GraphModel(model, clip, vae, wanted.dtype)
            if plan is None or asked is None:
                plan = plan_of(graph, concept, wanted)
                asked = questions(plan, plan.eval_images, wanted.seed)
                n = len(asked.forget) + len(asked.retain)
                bar = ComfyProgress({Stage.IMAGES_BEFORE: n, Stage.IMAGES_AFTER: n})
            bar.preview = Sampled(graph, plan)
            with prepared(graph, plan):
                seen.append(observe(graph, asked, bar, stage, cache()))
                if len(seen) == 2:
                    metrics = compare(graph, plan, asked, *seen)
        assert plan is not None and asked is not None
        first, second = _both(seen)
        forget, retain = grids(plan, asked, first, second)
        picture = image(stack(forget, retain)) if forget is not None and retain is not None else written("no pictures")
        told = {"concepts": [c.name for c in plan.concepts], "pictures": n, "seed": wanted.seed, **metrics}
        return picture, json.dumps(told, indent=1)


def _both(seen: list[Evaluation]) -> tuple[Evaluation, Evaluation]:
    return seen[0], seen[1]
