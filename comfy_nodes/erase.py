"""SalUn Erase: the erasure itself, whose result is a MODEL of the same graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.delta.delta import Delta
from salun.diffusion.context import RunContext, training_session
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.erase import unlearn
from salun.diffusion.evaluation import EvalPrompts, Evaluation, eval_prompts
from salun.diffusion.mask_files import check_given_mask
from salun.diffusion.plan import Plan
from salun.diffusion.result import Run, grids
from salun.diffusion.stages import erasure_stages
from salun.diffusion.targets import STATE_BYTES, trained_entries
from salun.evaluation.detector import Samples
from salun.evaluation.metric import Predictions
from salun.masking.mask import Mask
from salun.masking.optimizers import check_optimizer
from salun.report.image_grid import stack
from salun.report.metrics import measured_lines, verdict_lines
from salun.runs.cache import key_of
from salun.runs.record import RunRecord

from .data import check_data
from .execution import computes, graph_and_plan, load_cached_mask, run_record, save_cached_mask
from .images import SamplePreview, TrainingPreview, text_image, to_image
from .inputs import WIRES, option_inputs, options_validation, wires
from .mask import summary
from .model import GraphModel
from .patches import apply_delta_patch
from .progress import ComfyProgress
from .storage import cache, state_folder
from .types import DELTA, MASK, Concepts, Data, Node, OptionValues, data_on

Result = tuple[Delta, Tensor, str, Mask]
"""(delta, before-and-after IMAGE, metrics as JSON, mask)."""
SIDES = ("before", "after")


class SalUnErase(Node):
    """Erases a concept from the MODEL in the graph."""

    TITLE = "SalUn Erase"
    RETURN_TYPES = ("MODEL", DELTA, "IMAGE", "STRING", "STRING", MASK, "STRING")  # saved graphs count outputs
    RETURN_NAMES = ("model", "delta", "before_after", "metrics", "verdict", "mask", "summary")
    OUTPUT_TOOLTIPS = (
        "The erased model, for a KSampler or any other node that takes a MODEL.",
        "The weight differences, for Save Delta, Save Erased Checkpoint, Save as LoRA and Apply Delta.",
        "Images of forget and retain prompts, before and after, at equal seeds.",
        "Metrics, losses and options as JSON.",
        "Whether the concept is erased and the rest intact, and what to do next.",
        "Mask of the weights that were trained, for Save Mask, Mask Heatmap and other erasures of the same model.",
        "Concept, selected weights, metrics and notes as lines of text.",
    )
    DESCRIPTION = (
        "Erases a concept from a model by SalUn: the weights that the concept depends on most are trained, and all "
        "others stay bit-identical. A LoRA before this node is part of the model. Results are cached, so "
        "the same inputs never train twice, even after a restart. A change of eval_images trains again; to see more "
        "images without training, use SalUn Evaluate."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Model to erase from: SD 1.x, SD 2.x or SDXL, with its patches."}),
                **wires("clip", "vae", "concept"),
                **option_inputs(
                    "density",
                    "until",
                    "steps",
                    "lr",
                    "batch_size",
                    "retain_weight",
                    "eval_images",
                    "seed",
                    advanced=("retain_weight",),
                ),
            },
            "optional": {
                "mask": (
                    MASK,
                    {"tooltip": f"{WIRES['mask'][1]['tooltip']} Unconnected: computed here at the density."},
                ),
                **wires("data", "options"),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        until: str | None = None,
        steps: str | None = None,
        lr: str | None = None,
        batch_size: str | None = None,
        retain_weight: str | None = None,
        eval_images: str | None = None,
    ) -> bool | str:
        return options_validation(
            until=until, steps=steps, lr=lr, batch_size=batch_size, retain_weight=retain_weight, eval_images=eval_images
        )

    @computes
    def run(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        concept: Concepts,
        mask: Mask | None = None,
        data: Data | None = None,
        options: OptionValues | None = None,
        **values: Any,
    ) -> tuple[Any, Delta, Tensor, str, str, Mask, str]:
        graph, plan = graph_and_plan(model, clip, vae, concept, values, options)
        check_optimizer(plan.options.optimizer)
        check_data(data, graph, plan)
        record = run_record("erasure", graph, plan, data, mask)
        result = _load_cached(record.fingerprint, graph, plan)
        if result is None:
            content = data.content if data is not None else None
            bar = ComfyProgress(erasure_stages(plan, content, masked=mask is not None), SamplePreview(graph, plan))
            with resumable(record, graph, plan):
                with training_session(graph, plan):
                    if mask is not None:
                        check_given_mask(mask, graph, plan)
                    content = data_on(content, graph.device) if content is not None else None
                    needed = plan.samples(masked=mask is not None)
                    if content is None and needed is not None:
                        content = build_training_set(graph, plan, bar, needed, cache())
                    if content is not None:
                        bar.preview = TrainingPreview(graph, plan, content)
                    run = unlearn(RunContext(graph, plan, record, bar, cache()), content, mask, grow=data is None)
                result = _cached(record.fingerprint, run)  # the state is removed only once the result is cached
        delta, image, metrics, trained = result
        facts = json.loads(metrics)
        verdict = "\n".join(verdict_lines(facts["metrics"]))
        after = apply_delta_patch(model, delta, graph.original())
        return after, delta, image, metrics, verdict, trained, _summary(facts, trained)


@contextmanager
def resumable(record: RunRecord, graph: GraphModel, plan: Plan) -> Iterator[None]:
    """Context manager: run the erasure inside. If it is interrupted, its mask and training state are retained."""
    total = sum(prod(graph.weights.shape(name)) for name in graph.weights)
    trained = trained_entries(total, plan)
    record.folder, record.resume = state_folder(record.fingerprint, total // 8 + 2 * (STATE_BYTES + 4) * trained), True
    record.best_effort = True
    with record.running():
        yield
    if record.folder is not None:
        shutil.rmtree(record.folder, ignore_errors=True)


def _before_after(plan: Plan, prompts: EvalPrompts, before: Evaluation, after: Evaluation) -> Tensor:
    forget, retain = grids(plan, prompts, before, after)
    if forget is None or retain is None:
        return text_image("eval_images is 0")
    return to_image(stack(forget, retain))


def _cached(key: str, run: Run) -> Result:
    """The result of a run, which is in the cache afterwards."""
    facts = {
        "concepts": [{"name": c.name, "anchor": c.anchor} for c in run.plan.concepts],
        "metrics": run.metrics,
        "mask": run.record.mask,
        "rounding": run.record.rounding,
        "losses": run.history,
        "timings": run.record.timings,
        "options": asdict(run.plan.options),
        "notes": run.record.notes,
        "until": run.record.more.get("until"),
    }
    metrics = json.dumps(facts, indent=1)
    size = sum(change.indices.nbytes + change.planes.nbytes for change in run.delta.changes.values())
    cache().save(key_of(delta_of=key), size, run.delta.save)
    save_cached_mask(cache(), key_of(mask_of=key), run.mask)
    tensors = {"metrics": torch.from_numpy(np.frombuffer(metrics.encode(), np.uint8).copy())}
    for side, evaluation in zip(SIDES, (run.before, run.after), strict=True):
        shown = {"forget": evaluation.forget, "retain": evaluation.retain}
        tensors |= {f"{side} {part}": torch.from_numpy(samples.images) for part, samples in shown.items()}
    cache().put(key, tensors)
    return run.delta, _before_after(run.plan, run.prompts, run.before, run.after), metrics, run.mask


def _load_cached(key: str, graph: GraphModel, plan: Plan) -> Result | None:
    """The result of an earlier run with the same inputs. Its images are drawn again, since blurring may differ."""
    tensors = cache().get(key)
    delta = cache().load(key_of(delta_of=key), Delta.load) if tensors is not None else None
    mask = load_cached_mask(cache(), key_of(mask_of=key)) if delta is not None else None
    if tensors is None or delta is None or mask is None or delta.base_hash != graph.base_hash:
        return None
    before, after = (_shown(tensors[f"{side} forget"], tensors[f"{side} retain"]) for side in SIDES)
    prompts = eval_prompts(plan, plan.recipe.eval_images, plan.options.seed)
    image = _before_after(plan, prompts, before, after)
    return delta, image, tensors["metrics"].numpy().tobytes().decode(), mask


def _summary(facts: dict[str, Any], mask: Mask) -> str:
    """An erasure in lines of text. facts: those of `_cached`."""
    concepts = [f"{each['name']} → {each['anchor'] or 'the empty prompt'}" for each in facts["concepts"]]
    lines = ["Concept: " + ", ".join(concepts), f"Mask: {summary(mask)}", *measured_lines(facts["metrics"])]
    return "\n".join([*lines, *(f"Note: {note}" for note in facts["notes"])])


def _shown(forget: Tensor, retain: Tensor) -> Evaluation:
    """An evaluation of which only the images are known, uint8 (n, H, W, 3) each."""
    none = torch.empty(0)
    samples = [Samples(images.numpy(), none, ()) for images in (forget, retain)]
    return Evaluation(samples[0], samples[1], Predictions(none, none, none))
