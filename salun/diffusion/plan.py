"""The plan of an erasure: concepts become prompts, and `auto` becomes numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from salun.detectors import default_detector
from salun.diffusion.goal import Goal
from salun.diffusion.model.few_steps import FewSteps, hint
from salun.diffusion.model.settings import ModelSettings, sampling_with
from salun.diffusion.options import EraseOptions, Recipe, Sampling
from salun.diffusion.prompts.concepts import Concept, ConceptPrompts, Prompts, mentioning, part, prompts_of, resolve
from salun.diffusion.prompts.sets import other_nouns
from salun.diffusion.unread import check_read, unread, without_effect
from salun.errors import ConfigError
from salun.evaluation.detector import Subject
from salun.methods import METHODS, Method, load
from salun.options import BY_GRADIENT, MASKS
from salun.progress import Stage
from salun.user_text import syntax_note

BUDGET, PROBES = 3, 10  # with a goal: times the recipe's steps at most, and probes in the recipe's steps
BY_GOAL = ("steps", "lr", "lr_decay", "forget_latents")  # numbers that a goal decides, where the options do not
POOL = 8  # adversarial embeddings of each concept in a hardened training
HARDENED = Goal(retain_drift=0.05, ra_drop=0.05, anchor=0.0, asr=0.05)  # its goal, where none is named
HARDENED_RETAIN = 3.0  # factor of the retain weight there
FEWEST_BETWEEN = 4  # steps between two probes
PART, FEWEST = 2, 16  # with a goal: this part of the recipe's forget latents, but not fewer than these

Samples = Literal["all", "forget", "anchor"]  # of a training set


@dataclass(frozen=True)
class Plan:
    """A fully resolved erasure.

    options: with every number set that has an effect, so that they reproduce the erasure. recipe: the numbers that
    depend on the model, from the options or the model's recipe. sampling: likewise. few_steps: a sign that the model is
    meant for few steps, where the options do not say how to sample. notes: lines for the user. detector: of the
    concepts in images, with its argument after a colon. goal: what to train towards; None for a fixed number of steps,
    those of the recipe. lr_given: whether the options name the learning rate; with a goal it is measured otherwise.
    all_latents: forget latents of a fixed number of steps, where a goal takes fewer. usual_steps: the model's, whatever
    the options say; a goal's probes are by them.
    """

    concepts: list[Concept]
    prompts: Prompts
    options: EraseOptions
    recipe: Recipe
    sampling: Sampling
    notes: list[str]
    few_steps: FewSteps | None = None
    detector: str = "self"
    goal: Goal | None = None
    lr_given: bool = False
    all_latents: int | None = None
    usual_steps: int = 0

    @property
    def subjects(self) -> list[Subject]:
        """The concepts, as detectors need to know them."""
        pairs = zip(self.concepts, self.prompts.concepts, strict=True)
        return [subject_of(concept, prompts) for concept, prompts in pairs]

    @property
    def name(self) -> str:
        """The concepts' names, for people."""
        return ", ".join(concept.name for concept in self.concepts)

    def summary(self, model: str) -> str:
        """What is erased from a model, and how, in a line. model: its name."""
        pairs = [f"“{c.name}” (anchor: {f'“{c.anchor}”' if c.anchor else 'the empty prompt'})" for c in self.concepts]
        if self.closed_form:
            training = ", in closed form" if self.method.data == "prompts" else ""
        elif self.goal is None:
            training = f", {self.recipe.steps} step{'s' * (self.recipe.steps != 1)}"
        else:
            training = f" until {self.goal}, at most {self.budget} steps"
        masked = self.method.takes_mask and self.options.mask != "full"
        weights = f" on {100 * self.options.density:.3g} % of the weights" if masked and not self.mask_is_file else ""
        return f"Erasing {', '.join(pairs)} from {model} by {self.method.title}{weights}{training}"

    @property
    def method(self) -> Method:
        """How the model unlearns."""
        return METHODS["diffusion"][self.options.method]

    @property
    def scope(self) -> str:
        """The layers that the mask may select."""
        assert self.options.scope is not None
        return self.options.scope

    @property
    def needs_frozen(self) -> bool:
        """Whether any loss needs the original model's predictions."""
        return "frozen" in (self.recipe.target, self.recipe.retain_target)

    @property
    def probe_every(self) -> int:
        """Steps between two probes of a training towards a goal."""
        return max(FEWEST_BETWEEN, (self.usual_steps or self.recipe.steps) // PROBES)

    @property
    def budget(self) -> int:
        """Steps at most."""
        capped = self.goal is None or self.options.steps is not None
        return self.recipe.steps if capped else BUDGET * self.recipe.steps

    def fixed(self) -> Plan:
        """The same with a fixed number of steps in place of the goal."""
        latents = self.recipe.forget_latents if self.all_latents is None else self.all_latents
        return replace(self, goal=None, recipe=replace(self.recipe, forget_latents=latents))

    @property
    def by_saliency(self) -> bool:
        """Whether the mask is found by gradients, which needs forget latents."""
        return self.method.takes_mask and self.options.mask in BY_GRADIENT

    @property
    def by_ratio(self) -> bool:
        """Whether finding the mask needs retain latents too."""
        return self.by_saliency and self.options.mask == "saliency-ratio"

    @property
    def mask_is_file(self) -> bool:
        """Whether the options name a mask file."""
        return self.method.takes_mask and self.options.mask not in MASKS

    def on_training_prompts(self) -> Plan:
        """The same, evaluated on training prompts, for searches that must not see those of the evaluation."""
        concepts = [replace(of, eval_forget=of.forget, eval_anchor=of.anchor) for of in self.prompts.concepts]
        return replace(self, prompts=replace(self.prompts, concepts=concepts, eval_retain=self.prompts.retain))

    def samples(self, masked: bool = False) -> Samples | None:
        """Which latents it needs: for training and probes, or for a mask that is not there yet; None for none."""
        data, scored = self.method.data, self.by_saliency and not masked
        if data == "latents" or self.goal is not None or (scored and (self.by_ratio or data == "anchor")):
            return "all"
        return "anchor" if data == "anchor" else "forget" if data == "forget" or scored else None

    @property
    def closed_form(self) -> bool:
        """Whether the method takes no training step."""
        stages = load(self.method.stages)(self) if self.method.stages else None
        return stages is not None and not any(cost.backward for cost in stages if cost.stage is Stage.TRAINING)


ConceptSpec = Concept | str | Sequence[Concept | str]
"""What to forget: one concept or several, each a `Concept` or a name."""


def make_plan(settings: ModelSettings, model: str, wanted: ConceptSpec, options: EraseOptions) -> Plan:
    """Resolve the concepts and the options' numbers with the model's settings.

    Raises ConfigError for a concept the model does not know, anchors that do not pair with the concepts, a recipe the
    model does not have, or an option that has no effect with the method.
    """
    options = _hardened(_of_method(options, settings, model))
    concepts, notes = _resolved(settings, model, _listed(wanted), options)
    recipe, goal, all_latents = settings.recipe, _goal(options, concepts), None
    if options.recipe == "paper":
        recipe = _paper_recipe(settings, model, concepts[0].kind, METHODS["diffusion"][options.method])
    usual = recipe.steps * len(concepts)
    recipe = replace(recipe, steps=usual)
    if goal is not None:
        few = max(recipe.forget_latents // PART, min(FEWEST, recipe.forget_latents))
        all_latents, recipe = recipe.forget_latents, replace(recipe, forget_latents=few)
    if options.harden:
        recipe = replace(recipe, retain_weight=HARDENED_RETAIN * recipe.retain_weight)
    unset = without_effect(options) | {*(BY_GOAL if goal is not None else ())}
    sampling = sampling_with(settings.sampling, options)
    chosen = (options.sampling_steps, options.sampling_guidance, options.sampler)
    few_steps = hint(settings.few_steps, settings.sampling, *chosen)
    names = [item.name for item in dataclasses.fields(Recipe) if hasattr(options, item.name)]
    resolved = {**vars(recipe), **METHODS["diffusion"][options.method].defaults}  # as an earlier record holds them
    check_read(options, [n for n in unread(options) if n not in names or getattr(options, n) != resolved[n]])
    recipe = replace(recipe, **{n: getattr(options, n) for n in names if getattr(options, n) is not None})
    if options.harden and recipe.target != "frozen":
        raise ConfigError("needs the frozen target", option="harden", advice="Use {target} frozen")
    if options.target_guidance and recipe.target != "frozen":
        raise ConfigError("needs the frozen target", option="target_guidance", advice="Use {target} frozen")
    plan = Plan(
        concepts=concepts,
        prompts=prompts_of(concepts, settings.vocabulary, options.prompt_style),
        options=replace(
            options,
            anchor=_repeatable(_listed(wanted), concepts, options),
            resolution=sampling.resolution,
            sampling_steps=sampling.steps,
            sampling_guidance=sampling.guidance,
            **{name: getattr(recipe, name) for name in names if name not in unset},
        ),
        recipe=recipe,
        sampling=sampling,
        notes=[*notes, *_notes_on_texts(concepts, sampling), *_left_out(concepts), *_notes_on(sampling, few_steps)],
        few_steps=few_steps,
        detector=options.detector or default_detector(settings.detector),
        goal=goal,
        lr_given=options.lr is not None,
        all_latents=all_latents if options.forget_latents is None else None,
        usual_steps=usual,
    )
    if plan.method.check:
        load(plan.method.check)(plan, None)
    return plan


def _of_method(options: EraseOptions, settings: ModelSettings, model: str) -> EraseOptions:
    """With the method's own values where the options name none; of a class-conditional model all weights are in scope.

    Raises ConfigError for a mask or timesteps that it cannot take, or a model that it cannot erase from.
    """
    method = METHODS["diffusion"][options.method]
    if settings.labels and method.text:
        raise ConfigError(
            f"is {method.name}, which edits cross-attention; {model} takes class labels and has none",
            option="method",
            advice="Use {method} salun or esd",
        )
    if options.mask is not None and not method.takes_mask:
        raise ConfigError(
            f"is {options.mask}, but the method {method.name} takes none", option="mask", advice="Omit {mask}"
        )
    known = {"scope": "full", **method.defaults, **({"mask": method.mask} if method.takes_mask else {})}
    if settings.labels:
        known["scope"] = "full"
    return replace(options, **{name: value for name, value in known.items() if getattr(options, name) is None})


def _hardened(options: EraseOptions) -> EraseOptions:
    """With adversarial embeddings where the goal needs them. Raises ConfigError for a method that takes none."""
    wanted = options.until is not None and Goal.parse(options.until).asr is not None
    options = replace(options, harden=options.harden or POOL) if wanted else options
    if options.harden and not METHODS["diffusion"][options.method].hardens:
        raise ConfigError(
            f"does not work with the method {options.method}, which has losses of its own",
            option="harden",
            advice="Use {method} salun, salun-soft or finetune",
        )
    return options


def _goal(options: EraseOptions, concepts: Sequence[Concept]) -> Goal | None:
    """What to train towards. Raises ConfigError for a method that cannot, or a concept that is not erased."""
    method = METHODS["diffusion"][options.method]
    anchored = method.anchored and options.anchor_share != 0 and not options.harden
    if options.until is not None:
        if method.goal == "none":
            raise ConfigError(
                f"does not work with the method {options.method}, which takes its steps or solves a closed form",
                option="until",
                advice="Omit {until}",
            )
        goal, names = Goal.parse(options.until, anchored), [concept.name for concept in concepts]
        single = [("ua", name) for name in goal.ua_of] + [("anchor", name) for name in goal.anchor_of]
        if unknown := [(rate, name) for rate, name in single if name not in names]:
            raise ConfigError(
                f"has {unknown[0][0]}[{unknown[0][1][:60]}], but erased is {' and '.join(map(repr, names))}",
                option="until",
                advice=f'Use {{until}} "ua[{names[0]}]>=0.98"',
            )
        return goal
    fixed = options.steps is not None or options.lr_decay is not None or options.recipe != "default"
    if method.goal != "default" or fixed:
        return None
    return HARDENED if options.harden else Goal() if anchored else Goal(anchor=0.0)


def subject_of(concept: Concept, prompts: ConceptPrompts) -> Subject:
    """A resolved concept, as a detector needs to know it."""
    return Subject(
        concept.name,
        concept.anchor or None,
        prompts.attribute,
        concept.preset,
        concept.synonyms[0] if concept.synonyms else concept.name,
        concept.anchors[0] if concept.anchors else concept.anchor or "",
        nouns=other_nouns(concept) if prompts.attribute is None and concept.kind == "object" else (),
    )


def _notes_on(sampling: Sampling, few_steps: FewSteps | None) -> list[str]:
    notes = [few_steps.text] if few_steps is not None else []
    if sampling.negative_prompt and not sampling.guided:
        notes.append(
            f"negative_prompt has no effect with sampling_guidance {sampling.guidance:g}: it needs guidance above 1"
        )
    return notes


def _notes_on_texts(concepts: Sequence[Concept], sampling: Sampling) -> list[str]:
    texts = [text for each in concepts for text in (each.name, each.anchor or "", *each.synonyms, *each.retain)]
    return syntax_note([*texts, sampling.negative_prompt])


def _left_out(concepts: Sequence[Concept]) -> list[str]:
    """A note on retain prompts that mention what is to be erased."""
    named = mentioning(concepts)
    if not named:
        return []
    listed = ", ".join(repr(text[:60]) for text in named[:3]) + (", …" if len(named) > 3 else "")
    return [f"retain prompts that mention what is to be erased are left out: {listed}"]


def _repeatable(given: list[Concept], concepts: list[Concept], options: EraseOptions) -> list[str]:
    """The anchors to record, so that the same names and options give the same prompts.

    A preset has an anchor for each of its phrases, which a single `anchor` would replace, so none is recorded for it.
    """
    if options.anchor or all(concept.anchor is None for concept in given):
        return options.anchor
    return [concept.anchor or "" for concept in concepts]


def _listed(wanted: ConceptSpec) -> list[Concept]:
    several = [wanted] if isinstance(wanted, Concept | str) else list(wanted)
    if not several:
        raise ConfigError("no concept is given", advice="Name what the model should forget: {concept} circle")
    return [Concept(each) if isinstance(each, str) else each for each in several]


def _resolved(
    settings: ModelSettings, model: str, concepts: list[Concept], options: EraseOptions
) -> tuple[list[Concept], list[str]]:
    if options.anchor and len(options.anchor) != len(concepts):
        raise ConfigError(
            f"{len(concepts)} concepts, but {len(options.anchor)} anchors",
            advice="Give one {anchor} for each {concept}, in the same order ('' for the empty prompt), or none",
        )
    filled, notes = [], []
    for concept, anchor in itertools.zip_longest(concepts, options.anchor):
        given = concept if anchor is None else replace(concept, anchor=anchor)
        resolved, added = resolve(given, settings.vocabulary, model, options.prompt_style)
        filled.append(resolved)
        notes += added
    parted, added = part(filled, settings.vocabulary)
    parted[0] = replace(parted[0], retain=(*parted[0].retain, *options.retain_prompts))
    return parted, notes + added


def _paper_recipe(settings: ModelSettings, model: str, kind: str, method: Method) -> Recipe:
    of_salun = method.mask == "saliency" and not method.paper_recipe
    papers = settings.paper_recipes
    if papers and not of_salun:
        if settings.labels or not method.paper_recipe:
            of_labels = " of class-conditional models" if settings.labels else ""
            raise ConfigError(
                f"is paper, but {method.title} has no numbers of a paper{of_labels} here",
                option="recipe",
                advice="Use {recipe} default",
            )
        return replace(settings.recipe, **method.paper_recipe)
    if not papers:
        raise ConfigError(
            f"is paper, but the paper has no recipe for a model like {model}",
            option="recipe",
            advice="Use {recipe} default",
        )
    if kind not in papers:
        raise ConfigError(
            f"is paper, but the paper has recipes for the kinds {' and '.join(papers)} only, not for {kind}",
            option="recipe",
            advice="Use {recipe} default",
        )
    return papers[kind]


def spread(n: int, available: int, seed: int) -> list[int]:
    """n indices out of `available`, each used equally often (±1), in an order fixed by the seed."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(available) for _ in range(math.ceil(n / available))]
    return [int(i) for order in rounds for i in order][:n]
