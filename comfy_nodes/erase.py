"""SalUn Erase: the erasure itself, its result at work in the graph at once."""

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
from salun.diffusion.context import prepared
from salun.diffusion.data.training_set import sample_data
from salun.diffusion.erase import carry_out
from salun.diffusion.evaluation import EvalPrompts, Evaluation, questions
from salun.diffusion.masks import check_given
from salun.diffusion.plan import Plan
from salun.diffusion.result import Run, grids
from salun.diffusion.targets import STATE_BYTES
from salun.masking.mask import Mask
from salun.masking.optimizers import check_optimizer
from salun.report.picture import stack
from salun.runs.cache import key_of
from salun.runs.record import RunRecord

from .inputs import in_inputs_names, inputs, options_of, wires
from .kinds import DATA, DELTA, MASK, Chosen, Concepts, Data, Node
from .mask import check_data
from .model import GraphModel, as_started
from .places import cache, unfinished
from .progress import ComfyProgress
from .weights import patched
from .work import Preview, Sampled, computes, image, plan_of, record_of, stages, written

OUTPUTS = (
    "The model without the concept: KSampler shows it at once.",
    "What changed: for Save Delta, Save Erased Checkpoint, Save as LoRA, Apply Delta.",
    "Pictures before and after, of the concept and of what is kept.",
    "Figures and losses as JSON.",
)


class SalUnErase(Node):
    """Make the MODEL in the graph forget a concept."""

    RETURN_TYPES, RETURN_NAMES = ("MODEL", DELTA, "IMAGE", "STRING"), ("model", "delta", "before_after", "figures")
    OUTPUT_TOOLTIPS = OUTPUTS
    DESCRIPTION = (
        "Makes a model forget a concept by SalUn: the weights that matter to it are found and trained, no other moves. "
        "Works on the model as it is here: a LoRA before this node is part of what is erased. The same inputs never "
        "train twice, not even after a restart; other eval_images do, and SalUn Evaluate shows more without."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "SD 1.x, 2.x or SDXL, with the patches that it has in the graph."}),
                **wires("clip", "vae", "concept"),
                **inputs("steps", "batch_size", "lr", "retain_weight", "density", "eval_images", "seed"),
            },
            "optional": {
                "given_mask": (
                    MASK,
                    {"tooltip": "From SalUn Saliency Mask or Load Mask, in place of density; without it one is found."},
                ),
                "given_data": (DATA, {"tooltip": "From SalUn Training Data; without it the model is sampled here."}),
                **wires("options"),
            },
        }

    @computes
    def run(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        concept: Concepts,
        given_mask: Mask | None = None,
        given_data: Data | None = None,
        options: Chosen | None = None,
        **given: Any,
    ) -> tuple[Any, Delta, Tensor, str]:
        wanted = as_started(options_of(given, options))
        check_optimizer(wanted.optimizer)
        graph = GraphModel(model, clip, vae, wanted.dtype)
        plan = plan_of(graph, concept, wanted)
        check_data(given_data, graph, plan)
        record = record_of("erasure", graph, plan, given_data, given_mask)
        kept = _kept(record.fingerprint, graph, plan)
        if kept is None:
            bar = ComfyProgress(stages(plan, given_data, given_mask is not None), Sampled(graph, plan))
            with resumable(record, graph, plan):
                with prepared(graph, plan):
                    if given_mask is not None:
                        check_given(given_mask, graph, plan)
                    data = given_data.on(graph.device) if given_data else sample_data(graph, plan, bar, cache=cache())
                    bar.preview = Preview(graph, plan, data)
                    run = carry_out(graph, plan, record, bar, cache(), data, given_mask)
                kept = _keep(record.fingerprint, run)  # first, and only then is the state let go
        delta, picture, figures = kept
        return patched(model, delta, graph.original()), delta, picture, figures


@contextmanager
def resumable(record: RunRecord, graph: GraphModel, plan: Plan) -> Iterator[None]:
    """Within, the run is on. One that is stopped leaves its mask and training state, which the next one takes up."""
    total = sum(prod(graph.weights.shape(name)) for name in graph.weights)
    salient = plan.options.density * total if plan.options.method == "salun" else total
    record.folder, record.resume = unfinished(record.fingerprint, total // 8 + int(2 * STATE_BYTES * salient)), True
    record.in_passing = True
    with record.running():
        yield
    if record.folder is not None:
        shutil.rmtree(record.folder, ignore_errors=True)


Kept = tuple[Delta, Tensor, str]
SIDES = ("before", "after")


def _drawn(plan: Plan, asked: EvalPrompts, before: Evaluation, after: Evaluation) -> Tensor:
    forget, retain = grids(plan, asked, before, after)
    if forget is None or retain is None:
        return written("eval_images is 0")
    return image(stack(forget, retain))


def _key_of_delta(key: str) -> str:
    return key_of(delta_of=key)


def _keep(key: str, run: Run) -> Kept:
    record = run.record.data
    told = {
        "concepts": [{"name": c.name, "anchor": c.anchor} for c in run.plan.concepts],
        "metrics": run.metrics,
        "mask": record["mask"],
        "rounding": record["rounding"],
        "losses": run.history,
        "timings": record["timings"],
        "options": asdict(run.plan.options),
        "notes": [in_inputs_names(note) for note in run.plan.notes],
    }
    figures = json.dumps(told, indent=1)
    size = sum(change.indices.nbytes + change.planes.nbytes for change in run.delta.changes.values())
    cache().save(_key_of_delta(key), size, run.delta.save)
    seen = {"figures": torch.from_numpy(np.frombuffer(figures.encode(), np.uint8).copy())}
    for side, observed in zip(SIDES, (run.before, run.after), strict=True):
        seen |= {f"{side} {what}": torch.from_numpy(getattr(observed, what)) for what in ("forget", "retain")}
    cache().put(key, seen)
    return run.delta, _drawn(run.plan, run.asked, run.before, run.after), figures


def _kept(key: str, graph: GraphModel, plan: Plan) -> Kept | None:
    """An erasure of these very inputs that was done before. Its pictures are drawn anew: whether to blur may differ."""
    seen = cache().get(key)
    delta = cache().load(_key_of_delta(key), Delta.load) if seen is not None else None
    if seen is None or delta is None or delta.base_hash != graph.base_hash:
        return None
    none = torch.empty(0)
    sides = [
        Evaluation(seen[f"{side} forget"].numpy(), seen[f"{side} retain"].numpy(), none, none, none) for side in SIDES
    ]
    asked = questions(plan, plan.eval_images, plan.options.seed)
    return delta, _drawn(plan, asked, *sides), seen["figures"].numpy().tobytes().decode()
