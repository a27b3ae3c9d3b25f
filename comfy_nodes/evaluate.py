"""SalUn Evaluate: compares two models on the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from salun.diffusion.context import training_session
from salun.diffusion.eval_models import Compared
from salun.diffusion.eval_options import option_name
from salun.diffusion.eval_output import write_evaluation
from salun.diffusion.evaluate import EvalResult, Side, Wanted, result_of
from salun.diffusion.result import grids
from salun.progress import Stage
from salun.report.image_grid import stack
from salun.report.metrics import verdict_lines

from .execution import computes, graph_and_plan
from .images import SamplePreview, to_image
from .look_inputs import EVALUATION, check_families, prompts_state
from .model import GraphModel
from .paths import output_path, validation
from .progress import ComfyProgress
from .storage import cache
from .types import Concepts, Node, OptionValues

SIDES, STAGES = ("before", "after"), (Stage.IMAGES_BEFORE, Stage.IMAGES_AFTER)


class SalUnEvaluate(Node):
    """Measures what changed between two models."""

    TITLE = "SalUn Evaluate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING", "STRING"), ("before_after", "metrics", "verdict")
    OUTPUT_TOOLTIPS = (
        "Images of the same prompts, before and after, at equal seeds.",
        "Metrics as JSON; null where unknown.",
        "Whether the concept is erased and the rest intact, and what to do next.",
    )
    DESCRIPTION = (
        "Compares two models on held-out prompts: whether the concept is erased, and whether the rest is intact. "
        "anchor_gap: 1 for the original model, 0 where the concept's prompts give the anchor's predictions. "
        "retain_change: how much the predictions of other prompts changed. eval.json, eval.csv and the page eval.html "
        "are written into a new folder in output/salun. Sampling and resolution: SalUn Options."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return EVALUATION.input_types()

    @classmethod
    def IS_CHANGED(cls, prompts: str | None = None, **inputs: Any) -> str:
        return prompts_state(prompts or "")  # None from another node

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        detector: str | None = None,
        metric: str | None = None,
        prompts: str | None = None,
        clip_model: str | None = None,
        max_prompts: str | None = None,
    ) -> bool | str:
        given = {"detector": detector, "metric": metric, "prompts": prompts, "clip_model": clip_model,
                 "max_prompts": max_prompts}  # fmt: skip
        return validation(None, "", lambda: EVALUATION.options({k: v for k, v in given.items() if v is not None}))

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
        check_families(before, after)
        chosen, named = EVALUATION.options(values)
        graph, plan = graph_and_plan(before, clip, vae, concept, {}, options)
        graphs = graph, GraphModel(after, clip, vae, plan.options.dtype)
        for of, side in zip(graphs, SIDES, strict=True):
            of.name = f"the MODEL {side}"
        with graph.with_options(plan.options):
            compared = Compared(graphs[1].name, graphs[1], graph, plan.concepts, plan.options)
            wanted = Wanted.of(graphs[1].name, compared, plan, chosen, "ComfyUI")
        wanted.record.notes[:0] = plan.notes
        result, sides = evaluated(graphs, wanted)
        data = result.as_json()
        folder, name = output_path("evaluation", "salun", "")
        write_evaluation(result, folder)
        data["folder"] = f"output/salun/{name}"
        forget, retain = grids(plan, wanted.prompts, *(of.held_out for of in sides.values()))
        assert forget is not None and retain is not None  # n is at least 2
        several = len(result.metrics) > 1
        lines = [
            f"{name}: {line}" if several else line
            for name, metrics in result.metrics.items()
            for line in verdict_lines(metrics, option_name)
        ]
        return to_image(stack(forget, retain)), with_given_names(json.dumps(data, indent=1), named), "\n".join(lines)


def with_given_names(text: str, named: Mapping[str, str]) -> str:
    """JSON with the names of files and folders as they were given: a graph's output should hold no path of its host."""
    for path in sorted(named, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], json.dumps(named[path])[1:-1])
    return text


def evaluated(graphs: Sequence[GraphModel], wanted: Wanted) -> tuple[EvalResult, dict[str, Side]]:
    """All that an evaluation finds, and the samples of both models. Only one network is in memory at a time.

    Args:
        graphs: The original and the erased model, which have what the core uses of a `Model`.
    """
    bar, sides = ComfyProgress(wanted.stages), {}
    wanted.prepare(bar)
    for side, graph, stage in zip(SIDES, graphs, STAGES, strict=True):
        bar.preview = SamplePreview(graph, wanted.plan)
        with training_session(graph, wanted.plan):
            sides[side] = wanted.sampled(graph, stage, bar, cache())
    bar.preview = None  # from here on nothing is sampled
    with training_session(graphs[0], wanted.plan):
        return result_of(wanted, sides, bar), sides
