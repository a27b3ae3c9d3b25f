"""How nodes run the core: gradients, errors and interrupts, the plan, and the digests that identify a result."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from salun.compute.device import fix_cublas
from salun.diffusion.plan import Plan, make_plan
from salun.errors import Cancelled, MaskError, SalunError
from salun.masking.mask import Mask
from salun.runs.cache import Cache, digest_of
from salun.runs.record import RunRecord
from salun.version import __version__

from .inputs import erase_options
from .model import GraphModel
from .types import Concepts, Data, OptionValues

ADVICE = {  # error code → advice, where it differs from that on the command line
    "deltas-applied": "Load the base instead and apply all deltas to it: connect one SalUn Apply Delta to the next",
    "no-bitsandbytes": "Install bitsandbytes in ComfyUI's Python environment, or set {optimizer} to adam",
    "no-retain-set": "Set {retain_latents} above 0, or connect retain_images to SalUn Training Data",
    "other-model-mask": "Make one with SalUn Saliency Mask",
}
EMBEDDING = "embedding:"  # ComfyUI's syntax for a textual inversion in a prompt
DIGEST = "digest"  # metadata key of a cached mask
Run = TypeVar("Run", bound=Callable[..., Any])


def computes(run: Run) -> Run:
    """Decorates a node's method that computes gradients: ComfyUI calls nodes in torch's inference mode.

    Errors give the advice of `ADVICE`; the core's `Cancelled` becomes ComfyUI's own interrupt again.
    """

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return run(*args, **kwargs)
        except Cancelled as cancelled:
            interrupt = cancelled.__cause__ or cancelled
        except SalunError as error:
            error.advice = ADVICE.get(error.code, error.advice)
            raise
        raise interrupt.with_traceback(None)  # its frames would keep the network in memory while ComfyUI holds it

    return cast(Run, wrapped)


def graph_and_plan(
    model: Any, clip: Any, vae: Any, concept: Concepts, values: OptionValues, shared: OptionValues | None
) -> tuple[GraphModel, Plan]:
    """The core's view of a node's MODEL, CLIP and VAE, and the plan of an erasure from it.

    low_vram is on under ComfyUI's --lowvram and --novram. (cuBLAS reads the configuration that `deterministic` needs
    only once, before the first sampling on a CUDA device since ComfyUI's start.)

    Args:
        values: The node's option inputs.
        shared: Those of SalUn Options, if it is connected.
    """
    from comfy import model_management

    options = erase_options(values, shared)
    if options.deterministic:
        fix_cublas()
    state = getattr(getattr(model_management, "vram_state", None), "name", "")
    options = replace(options, low_vram=options.low_vram or state in ("LOW_VRAM", "NO_VRAM"))
    graph = GraphModel(model, clip, vae, options.dtype)
    return graph, make_plan(graph.settings_with(options), graph.name, list(concept), options)


def run_record(
    result: str, graph: GraphModel, plan: Plan, data: Data | None = None, mask: Mask | None = None
) -> RunRecord:
    """The record of a node's run. Its fingerprint covers all that the result depends on, and is its cache key."""
    options = {"model": graph.name, "concept": [c.name for c in plan.concepts], **asdict(plan.options)}
    facts = {
        **fingerprint_facts(graph, plan),
        "result": result,
        "data": data.digest if data is not None else "",
        "mask": mask_digest(mask) if mask is not None else "",
    }
    return RunRecord(None, "ComfyUI", options, plan.options.seed, str(graph.device), facts)


def fingerprint_facts(graph: GraphModel, plan: Plan) -> dict[str, str]:
    """What a result depends on besides the options, the versions, and a node's data and mask."""
    return {
        "base": graph.base_hash,
        "text": text_digest(graph, plan),
        "vae": graph.vae_hash if graph.vae is not None else "",
        "prompts": plan.prompts.digest,
        "concepts": repr(plan.concepts),
        "sampling": repr((graph.settings_with(plan.options).sampling, plan.recipe.saliency_timesteps)),
        "dtype": str(graph.dtype),
        "gpu": torch.cuda.get_device_name(graph.device) if graph.device.type == "cuda" else "none",
        "salun": __version__,
        **graph.sampler_facts(),
    }


def text_digest(graph: GraphModel, plan: Plan) -> str:
    """A digest of the text encoder: of how it encodes the plan's prompts with an embedding, and a few others."""
    prompts = plan.prompts
    parts = [part for c in prompts.concepts for part in (c.forget, c.anchor, c.eval_forget, c.eval_anchor)]
    parts += [prompts.retain, prompts.eval_retain]
    texts = [part[0].text for part in parts if part]
    texts += [prompt.text for part in parts for prompt in part if EMBEDDING in prompt.text]
    with graph.with_options(plan.options):
        encoded = graph.encode(list(dict.fromkeys([*texts, plan.options.negative_prompt or "", ""])))
    return digest_of(encoded.hidden, *(encoded.extra[name] for name in sorted(encoded.extra)))


def mask_digest(mask: Mask) -> str:
    """A hash of a mask: its selected weights and its metadata."""
    digest = hashlib.sha256(json.dumps(dict(sorted(mask.metadata.items()))).encode())
    for name, row in mask.bits.items():
        digest.update(f"{name}\0".encode())
        digest.update(row.data)
    return digest.hexdigest()


def save_cached_mask(cache: Cache, key: str, mask: Mask) -> None:
    """Store a mask in the cache, with a digest of its content."""
    stored = Mask(mask.bits, mask.shapes, {**mask.metadata, DIGEST: mask_digest(mask)})
    cache.save(key, sum(row.nbytes for row in mask.bits.values()), stored.save)


def load_cached_mask(cache: Cache, key: str) -> Mask | None:
    """A mask of the cache, or None if there is no valid one."""

    def read(path: Path) -> Mask:
        stored = Mask.load(path)
        metadata = {name: text for name, text in stored.metadata.items() if name != DIGEST}
        mask = Mask(stored.bits, stored.shapes, metadata)
        if stored.metadata.get(DIGEST) != mask_digest(mask):
            raise MaskError(f"{path} is damaged: its content is not what was written")
        return mask

    return cache.load(key, read)
