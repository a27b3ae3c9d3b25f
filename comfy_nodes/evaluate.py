"""SalUn Evaluate: compares two models on the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from salun.diffusion.context import training_session
from salun.diffusion.eval_models import Compared
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.eval_output import write_evaluation
from salun.diffusion.eval_sets import sampled_set, seeds_of, wanted_sets
from salun.diffusion.evaluate import (
    EvalResult,
    Side,
    further_results,
    held_out_results,
    prepare_metrics,
    record_of,
    wanted_detectors,
    wanted_metrics,
)
from salun.diffusion.evaluation import EvalPrompts, eval_prompts, evaluate_model, evaluated_pair, metrics_of
from salun.diffusion.plan import Plan
from salun.diffusion.prompts.sets import PromptSet
from salun.diffusion.result import grids
from salun.errors import ConfigError
from salun.progress import Stage, StageCost
from salun.report.image_grid import stack
from salun.report.metrics import verdict_lines

from .eval_inputs import eval_inputs, eval_options, prompts_state
from .execution import computes, graph_and_plan
from .families import family_of
from .images import SamplePreview, to_image
from .inputs import wires
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
        "The same prompts and seeds in both models.",
        "Metrics as JSON; null where unknown.",
        "Whether the erasure worked, and what to do next.",
    )
    DESCRIPTION = (
        "Compares two models on held-out prompts: whether the concept is gone, and whether the rest stayed. "
        "anchor_gap: 1 for the original model, 0 where the concept's prompts give the anchor's predictions. "
        "retain_change: how much the predictions of other prompts changed. Sampling and resolution: SalUn Options."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("MODEL", {"tooltip": "The original model."}),
                "after": ("MODEL", {"tooltip": "The erased model."}),
                **wires("clip", "vae", "concept"),
                **eval_inputs(main=True),
            },
            "optional": {**wires("options"), **eval_inputs(main=False)},
        }

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
    ) -> bool | str:
        given = {"detector": detector, "metric": metric, "prompts": prompts, "clip_model": clip_model}
        return validation(None, "", lambda: eval_options({k: v for k, v in given.items() if v is not None}))

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
        chosen, named = eval_options(values)
        graph, plan = graph_and_plan(before, clip, vae, concept, {}, options)
        graphs = graph, GraphModel(after, clip, vae, plan.options.dtype)
        for of, side in zip(graphs, SIDES, strict=True):
            of.name = f"the MODEL {side}"
        result, sides = evaluated(graphs, plan, chosen, named)
        data = result.as_json()
        if chosen.keep_images:
            folder, name = output_path("evaluation", "salun", "")
            write_evaluation(result, folder)
            data["folder"] = f"output/salun/{name}"
        forget, retain = grids(plan, eval_prompts(plan, chosen.n, chosen.seed), *(of.held_out for of in sides.values()))
        assert forget is not None and retain is not None  # n is at least 2
        several = len(result.metrics) > 1
        lines = [
            f"{name}: {line}" if several else line
            for name, metrics in result.metrics.items()
            for line in verdict_lines(metrics)
        ]
        return to_image(stack(forget, retain)), json.dumps(data, indent=1), "\n".join(lines)


def evaluated(
    graphs: Any, plan: Plan, options: EvalOptions, named: Mapping[str, str]
) -> tuple[EvalResult, dict[str, Side]]:
    """All that an evaluation finds, and the images of both models. Only one network is in memory at a time.

    Args:
        graphs: `GraphModel` of the original and of the erased model, which have what the core uses of a `Model`.
        named: Detector or metric → its name in the result.
    """
    original, erased = graphs
    compared = Compared(erased.name, erased, original, plan.concepts, plan.options)
    record = record_of(erased.name, options, compared, plan, "ComfyUI")
    detectors = {named.get(name, name): of for name, of in wanted_detectors(compared, plan, options).items()}
    measures = {named.get(name, name): of for name, of in wanted_metrics(compared, options).items()}
    prompts = eval_prompts(plan, options.n, options.seed)
    with original.with_options(plan.options):
        wanted = wanted_sets(options, plan, original, record)
    bar, sides = ComfyProgress(stages(prompts, wanted, len(detectors))), {}
    prepare_metrics(measures, prompts, wanted, bar)
    for side, graph, stage in zip(SIDES, graphs, STAGES, strict=True):
        bar.preview = SamplePreview(graph, plan)
        with training_session(graph, plan):
            held_out = evaluate_model(graph, prompts, bar, stage, cache())
            sets = [sampled_set(graph, of, seeds_of(of, options.seed), bar, stage, cache()) for of in wanted]
        sides[side] = Side(held_out, sets)
    bar.preview = None  # from here on nothing is sampled
    with training_session(original, plan):
        seen = sides["before"].held_out, sides["after"].held_out
        pairs = {name: evaluated_pair(of, plan, prompts, *seen, bar) for name, of in detectors.items()}
        results = [
            *held_out_results(sides, prompts, detectors, pairs, measures, bar),
            *further_results(sides, wanted, options.seed, detectors, measures, bar),
        ]
    metrics = {name: metrics_of(of, pairs[name]) for name, of in detectors.items()}
    record.notes[:0] = plan.notes
    return EvalResult(compared, plan, options, detectors, pairs, metrics, results, record), sides


def stages(prompts: EvalPrompts, wanted: Sequence[PromptSet], detectors: int) -> list[StageCost]:
    """What the progress bar counts. detectors: how many there are."""
    after = len(prompts.forget) + len(prompts.retain) + sum(len(of.rows) for of in wanted)
    before = after + len(prompts.anchors[0])
    steps = {Stage.IMAGES_BEFORE: before, Stage.IMAGES_AFTER: after, Stage.DETECTING: (before + after) * detectors}
    return [StageCost(stage, count) for stage, count in steps.items()]
