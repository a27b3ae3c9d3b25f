"""The training data of an erasure: latents sampled from the model itself, and the prompts' encodings."""

from __future__ import annotations

from dataclasses import replace

import torch

from salun.cache import Cache
from salun.diffusion.latents import item_seed, sample_latents
from salun.diffusion.losses import ErasureData
from salun.diffusion.models import Model
from salun.diffusion.plan import Plan, spread
from salun.progress import Event, Progress, silent


def sample_data(
    model: Model,
    plan: Plan,
    progress: Progress = silent,
    forget_only: bool = False,
    cache: Cache | None = None,
) -> ErasureData:
    """Sample forget, anchor and retain latents. No images, and no trip through the VAE.

    `forget_latents` for each concept, one concept after the other. Anchor latents are sampled only where the forget
    loss uses any; they are then retain samples as well, since it is the anchor's own prompts that an erasure harms
    first. forget_only: what the saliency needs, and no more. cache: where latents are kept for other runs.
    """
    prompts, seed = plan.prompts, plan.options.seed
    asked = [(one, i) for one in prompts.concepts for i in spread(plan.forget_latents, len(one.forget), seed)]
    forget, anchor = [one.forget[i].text for one, i in asked], [one.anchor[i].text for one, i in asked]
    keep = spread(plan.retain_latents, len(prompts.retain), seed + 1)
    retain = [] if forget_only else [prompts.retain[i].text for i in keep]
    jobs = {"forget": forget, "anchor": anchor if plan.anchor_share and not forget_only else [], "retain": retain}
    total, done, latents = sum(map(len, jobs.values())), 0, {}
    for role, texts in jobs.items():  # each in batches of its own, so that runs that share a role share its batches
        seeds = [item_seed(seed, role, i) for i in range(len(texts))]
        latents[role] = sample_latents(model, texts, seeds, after(done, total, progress), "sampling", cache)
        done += len(texts)
    forget_latents, anchor_latents, retain_latents = latents.values()
    return ErasureData(
        forget_latents=forget_latents,
        anchor_latents=anchor_latents if len(anchor_latents) else forget_latents,
        retain_latents=torch.cat([retain_latents, anchor_latents]),
        forget=model.encode(forget),
        anchor=model.encode(anchor),
        retain=model.encode([*retain, *jobs["anchor"]] or [""]),
        empty=model.encode([""]),
    )


def after(done: int, total: int, progress: Progress) -> Progress:
    """A progress for a part of a stage: counts on from what is done, out of the whole stage's total."""

    def tell(event: Event, /) -> None:
        progress(replace(event, step=done + event.step, total=total))

    return tell
