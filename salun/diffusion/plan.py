"""From what the user said to what will be done: words become prompts, `auto` becomes numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from salun.diffusion.model.few_steps import FewSteps, hint
from salun.diffusion.model.settings import ModelSettings, sampling_with
from salun.diffusion.prompts.concepts import Concept, Prompts, part, prompts_of, resolve
from salun.errors import ConfigError
from salun.options import EraseOptions, Recipe, Sampling
from salun.progress import Stage, StageCost
from salun.user_text import syntax_note

if TYPE_CHECKING:
    from salun.diffusion.losses import ErasureData

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """One erasure, decided.

    options: every number known, so that they repeat the erasure. sampling: what `options` make of the model's own.
    few_steps: a sign that the model is meant for few steps, where the options do not say how to sample. notes: lines
    for the user.
    """

    concepts: list[Concept]
    prompts: Prompts
    options: EraseOptions
    sampling: Sampling
    saliency_timesteps: int
    notes: list[str]
    few_steps: FewSteps | None = None

    # `auto` is gone from the options below; these say so to the type checker
    @property
    def name(self) -> str:
        """The concepts' names, for people."""
        return ", ".join(concept.name for concept in self.concepts)

    @property
    def steps(self) -> int:
        return _known(self.options.steps)

    @property
    def batch_size(self) -> int:
        return _known(self.options.batch_size)

    @property
    def lr(self) -> float:
        return _known(self.options.lr)

    @property
    def lr_decay(self) -> float:
        return _known(self.options.lr_decay)

    @property
    def retain_weight(self) -> float:
        return _known(self.options.retain_weight)

    @property
    def guidance(self) -> float:
        return _known(self.options.guidance)

    @property
    def anchor_share(self) -> float:
        return _known(self.options.anchor_share)

    @property
    def target(self) -> str:
        return _known(self.options.target)

    @property
    def retain_target(self) -> str:
        return _known(self.options.retain_target)

    @property
    def forget_latents(self) -> int:
        return _known(self.options.forget_latents)

    @property
    def retain_latents(self) -> int:
        return _known(self.options.retain_latents)

    @property
    def eval_images(self) -> int:
        return _known(self.options.eval_images)

    @property
    def needs_frozen(self) -> bool:
        """Whether any loss needs the original model's predictions."""
        return "frozen" in (self.target, self.retain_target)

    @property
    def by_saliency(self) -> bool:
        """Whether the mask is found by gradients, which needs training data."""
        return self.options.method == "salun" and self.options.mask in ("saliency", "shuffled")

    def stages(self, data: ErasureData | None = None, images: int = 0, masked: bool = False) -> list[StageCost]:
        """What an erasure does, in order, and what it costs: behind progress, time left, dry runs, tab and nodes.

        Args:
            data: The training set, where it is there already; nothing is sampled then.
            images: Forget images of the user's own for each concept, in place of samples; 0 for none, or where their
                number is not known yet (`options.forget_images`).
            masked: The mask is there already.
        """
        concepts, batch = len(self.concepts), self.batch_size
        own = bool(images or self.options.forget_images)
        forget = len(data.forget_latents) if data is not None else (images or self.forget_latents) * concepts
        anchors = min(images or self.forget_latents, self.forget_latents) * concepts if self.anchor_share else 0
        sampled = 0 if data is not None else (0 if own else forget) + anchors + self.retain_latents
        shown = self.eval_images * (concepts + 1)
        parts = concepts if self.options.combine == "union" else 1
        scored = self.by_saliency and not masked
        batches = parts * self.saliency_timesteps * -(-(forget // parts) // batch) if scored else 0
        passes, trained = self.sampling.passes, self.steps * batch * 2
        frozen = self.needs_frozen
        stages = [
            StageCost(Stage.SAMPLING, sampled, forward=sampled * passes),
            StageCost(Stage.IMAGES_BEFORE, shown, forward=shown * passes),
            StageCost(Stage.SALIENCY, batches, backward=forget * self.saliency_timesteps * 2 if scored else 0),
            StageCost(Stage.FROZEN_TARGETS, self.steps if frozen else 0, forward=trained if frozen else 0),
            StageCost(Stage.TRAINING, self.steps, backward=trained),
            StageCost(Stage.IMAGES_AFTER, shown, forward=shown * passes),
        ]
        return [stage for stage in stages if stage.steps]


ConceptSpec = Concept | str | Sequence[Concept | str]
"""What a user names to forget: one concept or several, each in full or by its name."""


def make_plan(settings: ModelSettings, model: str, wanted: ConceptSpec, options: EraseOptions) -> Plan:
    """Fill the concepts' words and the options' numbers in from the model's own settings.

    Raises ConfigError for a concept the model does not know, anchors that do not pair with the concepts, or a recipe
    the model does not have.
    """
    concepts, notes = _resolved(settings, model, _listed(wanted), options)
    recipe = settings.recipe
    if options.recipe == "paper":
        recipe = _paper_recipe(settings, model, concepts[0].kind)
    recipe = replace(recipe, steps=recipe.steps * len(concepts))
    sampling = sampling_with(settings.sampling, options)
    chosen = (options.sampling_steps, options.sampling_guidance, options.sampler)
    few_steps = hint(settings.few_steps, settings.sampling, *chosen)
    numbers = {
        item.name: getattr(recipe, item.name)
        for item in dataclasses.fields(Recipe)
        if hasattr(options, item.name) and getattr(options, item.name) is None
    }
    return Plan(
        concepts=concepts,
        prompts=prompts_of(concepts, settings.vocabulary, options.prompt_style),
        options=replace(
            options,
            anchor=_repeatable(_listed(wanted), concepts, options),
            resolution=sampling.resolution,
            sampling_steps=sampling.steps,
            sampling_guidance=sampling.guidance,
            **numbers,
        ),
        sampling=sampling,
        saliency_timesteps=recipe.saliency_timesteps,
        notes=[*notes, *_notes_on_texts(concepts, sampling), *_notes_on(sampling, few_steps)],
        few_steps=few_steps,
    )


def _notes_on(sampling: Sampling, few_steps: FewSteps | None) -> list[str]:
    notes = [few_steps.text] if few_steps is not None else []
    if sampling.negative_prompt and not sampling.guided:
        given = f"--sampling-guidance {sampling.guidance:g}"
        notes.append(f"--negative-prompt has no effect with {given}: it works by guidance above 1")
    return notes


def _notes_on_texts(concepts: Sequence[Concept], sampling: Sampling) -> list[str]:
    texts = [text for each in concepts for text in (each.name, each.anchor or "", *each.synonyms, *each.retain)]
    return syntax_note([*texts, sampling.negative_prompt])


def _repeatable(asked: list[Concept], concepts: list[Concept], options: EraseOptions) -> list[str]:
    """The anchors to note, such that the same names and options give the same prompts again.

    A preset has an anchor for each of its phrases, which one `--anchor` would replace: so none is noted for it.
    """
    if options.anchor or all(concept.anchor is None for concept in asked):
        return options.anchor
    return [concept.anchor or "" for concept in concepts]


def _listed(wanted: ConceptSpec) -> list[Concept]:
    several = [wanted] if isinstance(wanted, Concept | str) else list(wanted)
    if not several:
        raise ConfigError("no concept is given: name what the model should forget, e.g. --concept circle")
    return [Concept(each) if isinstance(each, str) else each for each in several]


def _resolved(
    settings: ModelSettings, model: str, concepts: list[Concept], options: EraseOptions
) -> tuple[list[Concept], list[str]]:
    if options.anchor and len(options.anchor) != len(concepts):
        raise ConfigError(
            f"{len(concepts)} --concept, but {len(options.anchor)} --anchor: give one for each, in the same order "
            "('' for the empty prompt), or none"
        )
    filled, notes = [], []
    for concept, anchor in itertools.zip_longest(concepts, options.anchor):
        asked = concept if anchor is None else replace(concept, anchor=anchor)
        done, told = resolve(asked, settings.vocabulary, model, options.prompt_style)
        filled.append(done)
        notes += told
    parted, told = part(filled, settings.vocabulary)
    parted[0] = replace(parted[0], retain=(*parted[0].retain, *options.retain_prompts))
    return parted, notes + told


def _paper_recipe(settings: ModelSettings, model: str, kind: str) -> Recipe:
    papers = settings.paper_recipes
    if not papers:
        raise ConfigError(f"--recipe paper: the paper says nothing of a model like {model}; use the default recipe")
    if kind not in papers:
        raise ConfigError(
            f"--recipe paper: the authors erased concepts of the kinds {' and '.join(papers)}, none of the kind "
            f"{kind}; use the default recipe"
        )
    return papers[kind]


def spread(n: int, available: int, seed: int) -> list[int]:
    """n indices out of `available`, each used equally often (±1), in an order fixed by the seed."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(available) for _ in range(-(-n // available))]
    return [int(i) for order in rounds for i in order][:n]


def _known(value: T | None) -> T:
    assert value is not None
    return value
