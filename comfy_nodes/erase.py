"""SalUn Erase: the erasure itself, its result at work in the graph at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.cache import key_of
from salun.diffusion.data import sample_data
from salun.diffusion.erase import carry_out, prepared
from salun.diffusion.observe import Observation, Questions, questions
from salun.diffusion.plan import Plan
from salun.diffusion.result import Run, grids
from salun.errors import ModelError
from salun.formats.delta import Delta
from salun.mask import Mask
from salun.report.picture import stack
from salun.run_record import RunRecord
from salun.training import check_optimiser

from .inputs import COMPUTING, MASKING, MORE, TRAINING, inputs, options_of
from .kinds import CONCEPT, DATA, DELTA, MASK, Concepts, Data
from .mask import check_data, digest
from .model import GraphModel
from .places import cache
from .progress import Bar
from .weights import patched
from .work import Preview, computes, facts_of, image, plan_of, stages, written

OUTPUTS = (
    "The model without the concept: KSampler shows it at once.",
    "What changed: for Save Delta, Save Erased Checkpoint, Save as LoRA, Apply Delta.",
    "Pictures before and after, of the concept and of what is kept.",
    "Figures and losses as JSON.",
)


class SalUnErase:
    """Make the MODEL in the graph forget a concept."""

    CATEGORY, FUNCTION = "SalUn", "erase"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", DELTA, "IMAGE", "STRING"), ("model", "delta", "before_after", "figures")
    OUTPUT_TOOLTIPS = OUTPUTS
    DESCRIPTION = (
        "Makes a model forget a concept by SalUn: the weights that matter to it are found and trained, no other moves. "
        "Works on the model as it is here: a LoRA before this node is part of what is erased. The same inputs never "
        "train twice, not even after a restart."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "SD 1.x, 2.x or SDXL, with the patches that it has in the graph."}),
                "clip": ("CLIP", {"tooltip": "Encodes the concept's prompts."}),
                "vae": ("VAE", {"tooltip": "Shows the pictures before and after."}),
                "concept": (CONCEPT, {"tooltip": "From SalUn Concept."}),
                **inputs(*TRAINING, "density", "eval_images", "seed"),
            },
            "optional": {
                "given_mask": (
                    MASK,
                    {"tooltip": "From SalUn Saliency Mask or Load Mask; without it one is found here."},
                ),
                "given_data": (DATA, {"tooltip": "From SalUn Training Data; without it the model is sampled here."}),
                **inputs(*(n for n in MASKING if n != "density"), advanced=True),
                **inputs("forget_latents", "retain_latents", "resolution", advanced=True),
                **inputs("prompt_style", "negative_prompt", "clip_skip", advanced=True),
                **inputs(*(n for n in MORE if n != "eval_images"), *COMPUTING, advanced=True),
            },
        }

    @computes
    def erase(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        concept: Concepts,
        given_mask: Mask | None = None,
        given_data: Data | None = None,
        **given: Any,
    ) -> tuple[Any, Delta, Tensor, str]:
        options = options_of(given)
        check_optimiser(options.optimiser)
        check_data(given_data, concept)
        graph = GraphModel(model, clip, vae, options.dtype)
        plan = plan_of(graph, concept, options)
        facts = facts_of(graph, plan)
        key = key_of(
            what="comfy erasure",
            data=given_data.digest if given_data else None,
            mask=digest(given_mask) if given_mask else None,
            **facts,
        )
        kept = _kept(key, graph, plan)
        if kept is None:
            bar = Bar(stages(plan, given_data, given_mask is not None))
            told = {"model": graph.name, "concept": [c.name for c in plan.concepts], **asdict(plan.options)}
            record = RunRecord(None, "ComfyUI", told, options.seed, str(graph.device))
            with record.running(), prepared(graph, plan):
                data = given_data.on(graph.device) if given_data else sample_data(graph, plan, bar, cache=cache())
                bar.preview = Preview(graph, data)
                run = carry_out(graph, plan, record, bar, cache(), data, given_mask)
            kept = _keep(key, run)
        delta, picture, figures = kept
        return patched(model, delta, graph.original()), delta, picture, figures


Kept = tuple[Delta, Tensor, str]


SIDES = ("before", "after")


def _drawn(plan: Plan, asked: Questions, before: Observation, after: Observation) -> Tensor:
    forget, retain = grids(plan, asked, before, after)
    if forget is None or retain is None:
        return written("eval_images is 0")
    return image(stack(forget, retain))


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
        "notes": run.plan.notes,
    }
    figures = json.dumps(told, indent=1)
    store = cache()
    if store.limit:
        place = store.folder / key[:2] / f"{key}-delta.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        run.delta.save(place)
        seen = {"figures": torch.from_numpy(np.frombuffer(figures.encode(), np.uint8).copy())}
        for side, observed in zip(SIDES, (run.before, run.after), strict=True):
            seen |= {f"{side} {what}": torch.from_numpy(getattr(observed, what)) for what in ("forget", "retain")}
        store.put(key, seen)
    return run.delta, _drawn(run.plan, run.asked, run.before, run.after), figures


def _kept(key: str, graph: GraphModel, plan: Plan) -> Kept | None:
    """An erasure of these very inputs that was done before. Its pictures are drawn anew: whether to blur may differ."""
    store = cache()
    place, seen = store.folder / key[:2] / f"{key}-delta.safetensors", store.get(key)
    if seen is None or not place.is_file():
        return None
    try:
        delta = Delta.load(place)
    except ModelError:
        place.unlink(missing_ok=True)
        return None
    if delta.base_hash != graph.base_hash:
        return None
    none = torch.empty(0)
    sides = [
        Observation(seen[f"{side} forget"].numpy(), seen[f"{side} retain"].numpy(), none, none, none) for side in SIDES
    ]
    asked = questions(plan, plan.eval_images, plan.options.seed)
    return delta, _drawn(plan, asked, *sides), seen["figures"].numpy().tobytes().decode()
