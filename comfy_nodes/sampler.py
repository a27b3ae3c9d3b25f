"""Sampling a graph's model by ComfyUI's own samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salun.diffusion.data.latents import noise_of
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.sampler import conditioning_of, guided, trailing

if TYPE_CHECKING:
    from .model import GraphModel

DEFAULT_SAMPLER = "dpm++2m"
SAMPLERS = {  # the core's names → ComfyUI's functions; DDIM's steps are Euler's in its terms, as its own "ddim" has it
    "dpm++2m": "sample_dpmpp_2m",
    "ddim": "sample_euler",
    "euler": "sample_euler",
    "euler_a": "sample_euler_ancestral",
    "lcm": "sample_lcm",
}
STOCHASTIC = ("euler_a", "lcm")  # add noise at each step


@torch.no_grad()
def denoise(
    graph: GraphModel,
    noise: Tensor,
    prompts: Conditioning,
    empty: Conditioning,
    on_step: Callable[[], None],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """`DiffusionModel.denoise` in ComfyUI's terms: x is x_t/√ᾱ_t and σ is √(1/ᾱ_t − 1)."""
    from comfy.k_diffusion import sampling

    settings = graph.settings.sampling
    conditioning = conditioning_of(settings, prompts, empty)
    alphas_cumprod = graph.schedule.alphas_cumprod
    steps = trailing(settings.steps, len(alphas_cumprod))
    roots = alphas_cumprod[steps].sqrt()
    sigmas = (1 / alphas_cumprod[steps] - 1).sqrt()
    at = {float(sigma): (t, float(root)) for sigma, t, root in zip(sigmas, steps, roots, strict=True)}

    def x_0(x: Tensor, sigma: Tensor) -> Tensor:
        on_step()
        step, root = at[float(sigma[0])]
        t = step.to(graph.device).expand(len(x))
        return graph.schedule.x_0(x * root, guided(graph, x * root, t, conditioning, settings), t)

    ends = torch.cat([sigmas, torch.zeros(1)]).to(graph.device)
    more: dict[str, Any] = {}
    if settings.sampler in STOCHASTIC:
        more["noise_sampler"] = lambda *_: noise_of(graph, generators)
        # where these samplers look for the schedule, which differs by ComfyUI's version
        inner = SimpleNamespace(model_sampling=graph.model_sampling)
        x_0.inner_model = SimpleNamespace(inner_model=inner, model_patcher=graph.model)  # type: ignore[attr-defined]
    sample = getattr(sampling, SAMPLERS[settings.sampler or DEFAULT_SAMPLER])
    latents: Tensor = sample(x_0, noise / float(roots[0]), ends, disable=True, **more)
    return latents


def sampler_name(sampler: str | None) -> str:
    """The sampler and ComfyUI's version."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "unknown"
    return f"{SAMPLERS[sampler or DEFAULT_SAMPLER].removeprefix('sample_')} of ComfyUI {version}"
