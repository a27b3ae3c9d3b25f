"""What nodes that compute share: the way into the core and out, the plan, a bar's stages, what results depend on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.losses import ErasureData
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.result import blurred
from salun.errors import Cancelled, SalunError
from salun.masking.mask import Mask
from salun.report.picture import blurred as blurred_picture
from salun.runs.cache import digest_of
from salun.runs.record import RunRecord
from salun.version import __version__

from .inputs import in_inputs_names
from .kinds import Concepts, Data
from .model import GraphModel

EMBEDDING = "embedding:"  # ComfyUI's word for a textual inversion in a prompt
Run = TypeVar("Run", bound=Callable[..., Any])


def computes(run: Run) -> Run:
    """A node's function, run with gradients allowed: ComfyUI calls nodes in torch's inference mode.

    Errors name the node's inputs, not the command line's options, and an interrupt is ComfyUI's own again.
    """

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return run(*args, **kwargs)
        except Cancelled as stopped:
            interrupt = stopped.__cause__ or stopped
        except SalunError as error:
            error.args = (in_inputs_names(str(error)),)
            raise
        raise interrupt.with_traceback(None)  # whose frames would hold the network for as long as ComfyUI holds it

    return cast(Run, wrapped)


def plan_of(model: GraphModel, concept: Concepts, options: EraseOptions) -> Plan:
    """The plan of an erasure in a graph."""
    return make_plan(model.settings_with(options), model.name, list(concept), options)


def samples_drawn(plan: Plan, own: int = 0, forget_only: bool = False) -> int:
    """How many latents `sample_data` draws. own: pictures that each concept has of its own, in place of samples."""
    concepts = len(plan.concepts)
    few = min(own or plan.forget_latents, plan.forget_latents)
    forget = 0 if own else plan.forget_latents * concepts
    return forget if forget_only else forget + (few * concepts if plan.anchor_share else 0) + plan.retain_latents


def saliency_steps(plan: Plan, data: Data | None = None) -> int:
    """How many batches `find_mask` goes through; none for a mask that is no saliency's."""
    if not plan.by_saliency:
        return 0
    concepts = len(plan.concepts)
    forget = len(data.content.forget_latents) if data is not None else plan.forget_latents * concepts
    groups = concepts if plan.options.combine == "union" else 1
    return groups * plan.saliency_timesteps * -(-(forget // groups) // plan.batch_size)


def stages(plan: Plan, data: Data | None, masked: bool) -> dict[str, int]:
    """How many steps each stage of an erasure will tell, in their order. masked: a mask is there already."""
    pictures = plan.eval_images * (len(plan.concepts) + 1)
    found = {
        "sampling": samples_drawn(plan) if data is None else 0,
        "images before": pictures,
        "saliency": 0 if masked else saliency_steps(plan, data),
        "frozen targets": plan.steps if plan.needs_frozen else 0,
        "training": plan.steps,
        "images after": pictures,
    }
    return {name: steps for name, steps in found.items() if steps}


class Preview:
    """What the network makes of the first forget prompt right now: its guess of the picture, from much noise.

    Blurred where the pictures of the run are.
    """

    def __init__(self, model: GraphModel, plan: Plan, data: ErasureData) -> None:
        self.model, self.data, self.blur = model, data, any(blurred(plan))
        self.noise = torch.randn(data.forget_latents[:1].shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self) -> tuple[str, Any, int] | None:
        previewer = _previewer(self.model)
        if previewer is None:
            return None
        model, x_0 = self.model, self.data.forget_latents[:1]
        t = torch.tensor([model.schedule.t_at(0.7)], device=x_0.device)
        x_t = model.schedule.add_noise(x_0, self.noise.to(x_0.device), t)
        return _shown(previewer, model.schedule.x_0(x_t, model.predict(x_t, t, self.data.forget[:1]), t), self.blur)


class Sampled:
    """What was sampled last, once something was; blurred where the pictures of the run are."""

    def __init__(self, model: GraphModel, plan: Plan) -> None:
        self.model, self.blur = model, any(blurred(plan))

    def __call__(self) -> tuple[str, Any, int] | None:
        latent = self.model.sampled
        previewer = _previewer(self.model) if latent is not None else None
        return _shown(previewer, latent, self.blur) if latent is not None and previewer is not None else None


def _shown(previewer: Any, latent: Tensor, blur: bool) -> tuple[str, Any, int]:
    picture = previewer.decode_latent_to_preview(latent)
    return "JPEG", blurred_picture(picture) if blur else picture, 512


def _previewer(model: GraphModel) -> Any:
    import latent_preview

    found = latent_preview.get_previewer(model.device, model.latent_format)
    factors = getattr(model.latent_format, "latent_rgb_factors", None)
    if found is None and factors is not None:  # previews are off for sampling; a training is long
        found = latent_preview.Latent2RGBPreviewer(
            factors, getattr(model.latent_format, "latent_rgb_factors_bias", None)
        )
    return found


def image(pixels: np.ndarray) -> Tensor:
    """A picture, uint8 (h, w, 3), as ComfyUI's IMAGE (1, h, w, 3)."""
    return torch.from_numpy(np.array(pixels)).float()[None] / 255


def written(text: str) -> Tensor:
    """A line of text as an IMAGE, where there is no picture to show."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (max(64, 8 * len(text)), 40), (250, 250, 250))
    ImageDraw.Draw(sheet).text((8, 12), text, (40, 40, 46), ImageFont.load_default(size=12))
    return image(np.asarray(sheet))


def record_of(
    what: str, graph: GraphModel, plan: Plan, data: Data | None = None, mask: Mask | None = None
) -> RunRecord:
    """The record of a node's work; by its fingerprint, of all that the result depends on, the result is kept."""
    told = {"model": graph.name, "concept": [c.name for c in plan.concepts], **asdict(plan.options)}
    facts = {
        **facts_of(graph, plan),
        "what": what,
        "data": data.digest if data is not None else "",
        "mask": digest(mask) if mask is not None else "",
    }
    return RunRecord(None, "ComfyUI", told, plan.options.seed, str(graph.device), facts)


def facts_of(graph: GraphModel, plan: Plan) -> dict[str, str]:
    """All that a result depends on beside the options, the versions and what else is on a node's wires."""
    prompts = plan.prompts
    return {
        "base": graph.base_hash,
        "text": text_of(graph, plan),
        "vae": graph.vae_hash if graph.vae is not None else "",
        "prompts": prompts.digest,
        "concepts": repr(plan.concepts),
        "sampling": repr((graph.settings_with(plan.options).sampling, plan.saliency_timesteps)),
        "dtype": str(graph.dtype),
        "gpu": torch.cuda.get_device_name(graph.device) if graph.device.type == "cuda" else "none",
        "salun": __version__,
        **graph.sampler_facts(),
    }


def text_of(graph: GraphModel, plan: Plan) -> str:
    """A digest of the text encoder, known by what it makes of some of the plan's prompts: of all those with an
    embedding, and of a few others.
    """
    prompts = plan.prompts
    parts = [part for one in prompts.concepts for part in (one.forget, one.anchor, one.eval_forget, one.eval_anchor)]
    parts += [prompts.retain, prompts.eval_retain]
    away = plan.options.negative_prompt or ""
    texts = [part[0].text for part in parts if part]
    texts += [prompt.text for part in parts for prompt in part if EMBEDDING in prompt.text]
    with graph.read_as(plan.options):
        said = graph.encode(list(dict.fromkeys([*texts, away, ""])))
    return digest_of(said.hidden, *(said.extra[name] for name in sorted(said.extra)))


def digest(mask: Mask) -> str:
    """A hash of a mask: what it selects, and what it says of itself."""
    found = hashlib.sha256(json.dumps(dict(sorted(mask.metadata.items()))).encode())
    for name, row in mask.bits.items():
        found.update(f"{name}\0".encode())
        found.update(row.data)
    return found.hexdigest()
