"""The training set of an erasure: latents, sampled from the model itself or of the user's images, and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from salun.diffusion.data.images import EncodedImages, concept_folders, encode_folder
from salun.diffusion.data.latents import item_seed, sample_latents
from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
from salun.diffusion.plan import Plan, Samples, spread
from salun.diffusion.prompts.concepts import mentions
from salun.diffusion.stages import retain_growth
from salun.errors import ConfigError
from salun.progress import Event, Progress, Stage, in_parts, silent
from salun.runs.cache import Cache
from salun.user_text import as_spelled


@dataclass(frozen=True)
class UserLatents:
    """Latents of the user's own images, float32 (n, c, h, w) each, scaled.

    Args:
        forget: For each concept, in place of samples.
        retain: Added to the samples. captions: what each shows, None where that is not known.
        notes: What a user should know of the images that were read.
    """

    forget: list[Tensor] | None = None
    retain: Tensor | None = None
    captions: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Prompts:
    """Prompts of the forget samples and of the anchor in their place, (concepts · each,), one concept after the other.

    Args:
        rows: Of each forget prompt its number among its concept's.
        sampled_anchor: Anchor prompts to sample, `few` for each concept: with more images than that they repeat.
    """

    each: int
    few: int
    forget: list[str]
    rows: tuple[int, ...]
    anchor: list[str]
    sampled_anchor: list[str]
    retain: list[str]


def build_training_set(
    model: DiffusionModel,
    plan: Plan,
    progress: Progress = silent,
    needed: Samples = "all",
    cache: Cache | None = None,
    given: UserLatents | None = None,
) -> ErasureData:
    """Sample forget, anchor and retain latents, without the VAE; or encode the user's own images.

    `forget_latents` for each concept, one concept after the other; with `forget_images` all of its images instead, as
    many for each concept as the largest set. Anchor latents are sampled only where the forget loss uses any; they are
    then retain samples as well, since an erasure harms the anchor's own prompts first. `retain_images` are added to
    the retain samples.

    Args:
        needed: What to sample: "forget" is what the saliency alone needs, "anchor" the anchor's latents alone.
        cache: Where sampled latents are shared with other runs.
        given: Images that a host has encoded already, in place of the options' folders.

    Raises:
        ConfigError: Images of another number of concepts, or no retain samples at all.
    """
    user = given or _read_images(model, plan, progress, needed, cache)
    if user.forget is not None and len(user.forget) != len(plan.concepts):
        raise ConfigError(
            f"images of {len(user.forget)} concepts are given, but there are {len(plan.concepts)} concepts",
            advice="Give images of each concept",
        )
    prompts = _prompts_of(plan, user, needed)
    sampled = _sample(model, plan, prompts, user, progress, needed, cache)
    usable: list[int] = []
    captions: list[str] = []
    if user.retain is not None and needed == "all":
        usable, captions = _usable(list(user.captions), plan, model.settings.labels, progress)
    retain = [sampled["retain"], sampled["anchor"]]
    if user.retain is not None and needed == "all":
        retain.append(user.retain[usable].to(model.device))
    retain_prompts = [*prompts.retain, *prompts.sampled_anchor, *captions]
    if not retain_prompts and needed == "all":
        raise ConfigError(
            "the retain set is empty",
            advice="Set {retain_latents} above 0, or give {retain_images}",
            code="no-retain-set",
        )
    forget = sampled["forget"]
    if user.forget is not None:
        each = [latents[[i % len(latents) for i in range(prompts.each)]] for latents in user.forget]
        forget = torch.cat(each).to(model.device)
    anchor = sampled["anchor"]
    return ErasureData(
        forget_latents=forget,
        anchor_latents=_tile(anchor, prompts.few, prompts.each) if len(anchor) else forget,
        retain_latents=torch.cat(retain),
        forget=model.encode(prompts.forget),
        forget_rows=prompts.rows,
        anchor=model.encode(prompts.anchor),
        retain=model.encode(retain_prompts or [""]),
        empty=model.encode([""]),
        notes=user.notes,
    )


def further_retain(
    model: DiffusionModel, plan: Plan, progress: Progress = silent, cache: Cache | None = None
) -> tuple[Tensor, Conditioning]:
    """(latents, prompts) of retain samples beyond those of the training set."""
    few = plan.recipe.retain_latents
    rows = spread(few + retain_growth(plan), len(plan.prompts.retain), plan.options.seed + 1)[few:]
    prompts = [plan.prompts.retain[i].text for i in rows]
    seeds = [item_seed(plan.options.seed, "retain", few + i) for i in range(len(rows))]
    return sample_latents(model, prompts, seeds, progress, Stage.SAMPLING, cache), model.encode(prompts)


def _read_images(
    model: DiffusionModel, plan: Plan, progress: Progress, needed: Samples, cache: Cache | None
) -> UserLatents:
    """The images of the options' folders, encoded."""
    options = plan.options
    forget: list[EncodedImages] = []
    if options.forget_images is not None and needed != "anchor":
        names = [concept.name for concept in plan.concepts]
        folders = concept_folders(as_spelled(Path(options.forget_images).expanduser()), names)
        forget = [encode_folder(model, folder, progress, cache) for folder in folders]
    notes = [line for images in forget for line in images.notes]
    retain = None
    if options.retain_images is not None and needed == "all":
        retain = encode_folder(model, as_spelled(Path(options.retain_images).expanduser()), progress, cache)
        notes += [*retain.notes, *_in_both(forget, retain)]
    for line in notes:
        progress(Event(Stage.ENCODING, message=line))
    return UserLatents(
        [images.latents for images in forget] or None,
        retain.latents if retain is not None else None,
        tuple(retain.captions) if retain is not None else (),
        tuple(notes),
    )


def _prompts_of(plan: Plan, user: UserLatents, needed: Samples) -> _Prompts:
    prompts, seed, recipe = plan.prompts, plan.options.seed, plan.recipe
    each = max(map(len, user.forget)) if user.forget is not None else recipe.forget_latents
    few = min(each, recipe.forget_latents)
    rows = []
    for concept in prompts.concepts:
        order = spread(few, len(concept.forget), seed)
        rows += [(concept, order[i % few]) for i in range(each)]
    anchor = [concept.anchor[i].text for concept, i in rows]
    sampled_anchor = [text for start in range(0, len(anchor), each) for text in anchor[start : start + few]]
    retain = spread(recipe.retain_latents, len(prompts.retain), seed + 1)
    return _Prompts(
        each,
        few,
        forget=[concept.forget[i].text for concept, i in rows],
        rows=tuple(i for _, i in rows),
        anchor=anchor,
        sampled_anchor=sampled_anchor if recipe.anchor_share and needed != "forget" else [],
        retain=[prompts.retain[i].text for i in retain] if needed == "all" else [],
    )


def _sample(
    model: DiffusionModel,
    plan: Plan,
    prompts: _Prompts,
    user: UserLatents,
    progress: Progress,
    needed: Samples,
    cache: Cache | None,
) -> dict[str, Tensor]:
    """Latents of each role, in batches of its own, so that runs which share a role share its batches."""
    roles = {
        "forget": [] if user.forget is not None or needed == "anchor" else prompts.forget,
        "anchor": prompts.sampled_anchor,
        "retain": prompts.retain,
    }
    latents = {}
    parts = in_parts(progress, [len(texts) for texts in roles.values()])
    for (role, texts), part in zip(roles.items(), parts, strict=True):
        seeds = [item_seed(plan.options.seed, role, i) for i in range(len(texts))]
        latents[role] = sample_latents(model, texts, seeds, part, Stage.SAMPLING, cache)
    return latents


def _tile(latents: Tensor, few: int, each: int) -> Tensor:
    """`few` samples of each concept, repeated to `each` of each concept."""
    return latents[[start + i % few for start in range(0, len(latents), few) for i in range(each)]]


def _usable(captions: list[str | None], plan: Plan, labels: bool, progress: Progress) -> tuple[list[int], list[str]]:
    """Rows of the retain images, and their captions, without those whose caption names a concept to erase.

    Args:
        labels: Whether the captions are labels of a class-conditional model: then images without one are left out too,
            which would else be trained as images without a class.
    """
    phrases = {phrase for concept in plan.concepts for phrase in (concept.name, *concept.synonyms)}
    named = [i for i, text in enumerate(captions) if any(mentions(text or "", phrase) for phrase in phrases)]
    blank = [i for i, text in enumerate(captions) if labels and not text]
    for left_out, why in (
        (named, "their captions name what is to be erased"),
        (blank, "neither their folder's name nor their .txt file is a label of the model"),
    ):
        if left_out:
            progress(Event(Stage.ENCODING, message=f"{len(left_out)} retain images skipped: {why}"))
    usable = sorted(set(range(len(captions))) - {*named, *blank})
    return usable, [captions[i] or "" for i in usable]


def _in_both(forget: list[EncodedImages], retain: EncodedImages) -> list[str]:
    """A line if images are in the forget and in the retain set, by their pixels."""
    count = len(frozenset().union(*(images.digests for images in forget)) & retain.digests)
    return [f"{count} images of retain_images are in forget_images as well (same pixels)"] if count else []
