"""The training data of an erasure: latents, sampled from the model itself or of the user's pictures, and prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from salun.diffusion.data.images import EncodedImages, concept_folders, encode_folder
from salun.diffusion.data.latents import item_seed, sample_latents
from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.plan import Plan, spread
from salun.diffusion.prompts.concepts import mentions
from salun.errors import ConfigError
from salun.progress import Event, Progress, Stage, silent
from salun.runs.cache import Cache
from salun.user_text import as_spelled


@dataclass(frozen=True)
class UserLatents:
    """Latents of the user's own pictures, where a host holds them already: float32 (n, c, h, w) each, scaled.

    forget: for each concept, in place of samples. retain, with their captions: added to the samples.
    """

    forget: list[Tensor] | None = None
    retain: Tensor | None = None
    captions: tuple[str | None, ...] = ()


def sample_data(
    model: DiffusionModel,
    plan: Plan,
    progress: Progress = silent,
    forget_only: bool = False,
    cache: Cache | None = None,
    given: UserLatents | None = None,
) -> ErasureData:
    """Sample forget, anchor and retain latents, no trip through the VAE; or encode the user's own pictures.

    `forget_latents` for each concept, one concept after the other; with `forget_images` all of its pictures instead, as
    many for each concept as the one with most has. Anchor latents are sampled only where the forget loss uses any;
    they are then retain samples as well, since it is the anchor's own prompts that an erasure harms first.
    `retain_images` are added to the retain samples. forget_only: what the saliency needs, and no more. cache: where
    latents are kept for other runs. given: pictures that a host holds already, in place of the options' folders.
    """
    prompts, seed, options = plan.prompts, plan.options.seed, plan.options
    own = given.forget if given is not None else None
    read: list[EncodedImages] = []
    notes: list[str] = []
    if own is not None and len(own) != len(prompts.concepts):
        raise ConfigError(f"pictures of {len(own)} concepts are given for {len(prompts.concepts)}: give some for each")
    if options.forget_images is not None:
        names = [concept.name for concept in plan.concepts]
        folders = concept_folders(as_spelled(Path(options.forget_images).expanduser()), names)
        read = [encode_folder(model, folder, progress, cache) for folder in folders]
        own = [pictures.latents for pictures in read]
        notes = _told([line for pictures in read for line in pictures.notes], progress)
    each = max(map(len, own)) if own is not None else plan.forget_latents
    few = min(each, plan.forget_latents)  # anchor samples of a concept; with more pictures than that they come again
    asked = []
    for one in prompts.concepts:
        turn = spread(few, len(one.forget), seed)
        asked += [(one, turn[i % few]) for i in range(each)]
    forget, anchor = [one.forget[i].text for one, i in asked], [one.anchor[i].text for one, i in asked]
    anchors = [text for start in range(0, len(anchor), each) for text in anchor[start : start + few]]
    keep = spread(plan.retain_latents, len(prompts.retain), seed + 1)
    retain = [] if forget_only else [prompts.retain[i].text for i in keep]
    jobs = {
        "forget": [] if own is not None else forget,
        "anchor": anchors if plan.anchor_share and not forget_only else [],
        "retain": retain,
    }
    total, done, latents = sum(map(len, jobs.values())), 0, {}
    for role, texts in jobs.items():  # each in batches of its own, so that runs that share a role share its batches
        seeds = [item_seed(seed, role, i) for i in range(len(texts))]
        latents[role] = sample_latents(model, texts, seeds, after(done, total, progress), Stage.SAMPLING, cache)
        done += len(texts)
    if own is not None:
        latents["forget"] = torch.cat([pictures[[i % len(pictures) for i in range(each)]] for pictures in own]).to(
            model.device
        )
    kept, said = [latents["retain"], latents["anchor"]], [*retain, *jobs["anchor"]]
    more = given.retain if given is not None else None
    about = list(given.captions) if given is not None else []
    if options.retain_images is not None and not forget_only:
        folder = as_spelled(Path(options.retain_images).expanduser())
        pictures = encode_folder(model, folder, progress, cache)
        more, about = pictures.latents, pictures.captions
        notes += _told([*pictures.notes, *_in_both(read, pictures)], progress)
    if more is not None and not forget_only:
        usable, captions = _to_keep(about, plan, progress)
        kept.append(more[usable].to(model.device))
        said += captions
    if not said and not forget_only:
        raise ConfigError(
            "the retain set is empty",
            advice="Set {retain_latents} above 0, or give {retain_images}",
            code="no-retain-set",
        )
    return ErasureData(
        forget_latents=latents["forget"],
        anchor_latents=_repeated(latents["anchor"], few, each) if len(latents["anchor"]) else latents["forget"],
        retain_latents=torch.cat(kept),
        forget=model.encode(forget),
        anchor=model.encode(anchor),
        retain=model.encode(said or [""]),
        empty=model.encode([""]),
        notes=tuple(notes),
    )


def _repeated(latents: Tensor, few: int, each: int) -> Tensor:
    """`few` samples a concept, made `each` a concept by beginning again."""
    rows = [start + i % few for start in range(0, len(latents), few) for i in range(each)]
    return latents[rows]


def _to_keep(captions: list[str | None], plan: Plan, progress: Progress) -> tuple[list[int], list[str]]:
    """Which pictures may be kept, and as what: none whose caption names something that is to be forgotten."""
    phrases = {phrase for concept in plan.concepts for phrase in (concept.name, *concept.synonyms)}
    usable = [i for i, text in enumerate(captions) if not any(mentions(text or "", phrase) for phrase in phrases)]
    if len(usable) < len(captions):
        what = f"{len(captions) - len(usable)} pictures to keep left out: their captions name what is to be forgotten"
        progress(Event(Stage.ENCODING, message=what))
    return usable, [captions[i] or "" for i in usable]


def _told(notes: list[str], progress: Progress) -> list[str]:
    for line in notes:
        progress(Event(Stage.ENCODING, message=line))
    return notes


def _in_both(forget: list[EncodedImages], retain: EncodedImages) -> list[str]:
    """A line if images are in the forget and in the retain set, by their pixels."""
    count = len(frozenset().union(*(images.digests for images in forget)) & retain.digests)
    return [f"{count} images of --retain-images are in --forget-images as well (same pixels)"] if count else []


def after(done: int, total: int, progress: Progress) -> Progress:
    """A progress for a part of a stage: counts on from what is done, out of the whole stage's total."""

    def tell(event: Event, /) -> None:
        progress(replace(event, step=done + event.step, total=total))

    return tell
