"""The training data of an erasure: latents sampled from the model itself, and the prompts' encodings."""

from __future__ import annotations

import torch

from salun.diffusion.latents import item_seed, sample_latents
from salun.diffusion.losses import ErasureData
from salun.diffusion.models import Model
from salun.diffusion.plan import Plan, spread
from salun.progress import Progress, silent


def sample_data(model: Model, plan: Plan, progress: Progress = silent, forget_only: bool = False) -> ErasureData:
    """Sample forget, anchor and retain latents. No images, and no trip through the VAE.

    `forget_latents` for each concept, one concept after the other. Anchor latents are sampled only where the forget
    loss uses any; they are then retain samples as well, since it is the anchor's own prompts that an erasure harms
    first. forget_only: what the saliency needs, and no more.
    """
    prompts, seed = plan.prompts, plan.options.seed
    asked = [(one, i) for one in prompts.concepts for i in spread(plan.forget_latents, len(one.forget), seed)]
    forget, anchor = [one.forget[i].text for one, i in asked], [one.anchor[i].text for one, i in asked]
    keep = spread(plan.retain_latents, len(prompts.retain), seed + 1)
    retain = [] if forget_only else [prompts.retain[i].text for i in keep]
    jobs = {"forget": forget, "anchor": anchor if plan.anchor_share and not forget_only else [], "retain": retain}
    texts = [text for part in jobs.values() for text in part]
    seeds = [item_seed(seed, role, i) for role, part in jobs.items() for i in range(len(part))]
    latents = sample_latents(model, texts, seeds, progress, "sampling")
    forget_latents, anchor_latents, retain_latents = latents.split([len(part) for part in jobs.values()])
    return ErasureData(
        forget_latents=forget_latents,
        anchor_latents=anchor_latents if len(anchor_latents) else forget_latents,
        retain_latents=torch.cat([retain_latents, anchor_latents]),
        forget=model.encode(forget),
        anchor=model.encode(anchor),
        retain=model.encode([*retain, *jobs["anchor"]] or [""]),
        empty=model.encode([""]),
    )
