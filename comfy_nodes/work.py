"""What nodes that compute share: the plan, the stages of the bar, the preview, and the way out of inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from salun import __version__
from salun.cache import digest_of
from salun.diffusion.denoiser import add_noise
from salun.diffusion.losses import ErasureData
from salun.diffusion.plan import Plan, make_plan
from salun.options import EraseOptions
from salun.run_record import NOT_DECISIVE

from .kinds import Concepts, Data
from .model import GraphModel

Node = TypeVar("Node", bound=Callable[..., Any])


def computes(run: Node) -> Node:
    """A node's function, run with gradients allowed: ComfyUI calls nodes in torch's inference mode."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return run(*args, **kwargs)

    return cast(Node, wrapped)


def plan_of(model: GraphModel, concept: Concepts, options: EraseOptions) -> Plan:
    """The plan of an erasure in a graph."""
    return make_plan(model.settings_with(options), model.name, list(concept), options)


def stages(plan: Plan, data: Data | None = None, masked: bool = False, train: bool = True) -> dict[str, int]:
    """How many steps each stage will tell, in the order of a run."""
    concepts = len(plan.concepts)
    forget = len(data.content.forget_latents) if data is not None else plan.forget_latents * concepts
    found: dict[str, int] = {}
    if data is None:
        found["sampling"] = forget
        if train:
            found["sampling"] += (forget if plan.anchor_share else 0) + plan.retain_latents
    pictures = plan.eval_images * (concepts + 1)
    if train and pictures:
        found["pictures before"] = pictures
    if not masked and plan.options.method == "salun" and plan.options.mask in ("saliency", "shuffled"):
        found["saliency"] = plan.saliency_timesteps * -(-forget // plan.batch_size)
    if train:
        if plan.needs_frozen:
            found["frozen targets"] = plan.steps
        found["training"] = plan.steps
        if pictures:
            found["pictures after"] = pictures
    return found


class Preview:
    """What the network makes of the first forget prompt right now: its guess of the picture, from much noise."""

    def __init__(self, model: GraphModel, data: ErasureData) -> None:
        self.model, self.data = model, data
        self.noise = torch.randn(data.forget_latents[:1].shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self) -> tuple[str, Any, int] | None:
        previewer = _previewer(self.model)
        if previewer is None:
            return None
        model, x_0 = self.model, self.data.forget_latents[:1]
        t = torch.tensor([int(0.7 * len(model.alphas_cumprod))], device=x_0.device)
        a = model.alphas_cumprod.to(x_0.device)[t].view(-1, 1, 1, 1)
        x_t = add_noise(model, x_0, self.noise.to(x_0.device), t)
        said = model.predict(x_t, t, self.data.forget[:1])
        if model.prediction_type == "epsilon":
            guess = (x_t - (1 - a).sqrt() * said) / a.sqrt()
        else:
            guess = a.sqrt() * x_t - (1 - a).sqrt() * said
        return "JPEG", previewer.decode_latent_to_preview(guess), 512


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


def facts_of(graph: GraphModel, plan: Plan) -> dict[str, Any]:
    """All that a mask or an erasure in a graph depends on, beside what is on its other wires: JSON values."""
    some = [prompts[0].text for one in plan.prompts.concepts for prompts in (one.forget, one.anchor)]
    with graph.read_as(plan.options):
        said = graph.encode([*some, plan.prompts.retain[0].text, ""])
    options = {k: v for k, v in asdict(plan.options).items() if k not in NOT_DECISIVE}
    return {
        "base": graph.base_hash,
        "text": digest_of(said.hidden, *(said.extra[name] for name in sorted(said.extra))),
        "prompts": plan.prompts.digest,
        "concepts": [repr(one) for one in plan.concepts],
        "options": options,
        "sampling": repr((graph.settings_with(plan.options).sampling, plan.saliency_timesteps)),
        "device": graph.device.type,
        "dtype": str(graph.dtype),
        "torch": torch.__version__,
        "salun": __version__,
        **graph.sampler_facts(),
    }
