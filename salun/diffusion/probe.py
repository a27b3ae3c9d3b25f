"""A cheap look at a model in training: is the concept gone from held-out prompts, and what else moved?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.context import RunContext
from salun.diffusion.data.latents import item_seed, sample_conditionings, sample_latents
from salun.diffusion.data.training_set import build_training_set, further_retain
from salun.diffusion.evaluation import expected_retain
from salun.diffusion.goal import INFINITE, PLAUSIBLE, SURE, Goal, Probed
from salun.diffusion.plan import spread
from salun.diffusion.probe_detector import ConceptDetector, rate_below
from salun.diffusion.prompts.vocabulary import Prompt
from salun.diffusion.stages import OTHERS, of_probes, retain_growth
from salun.diffusion.task import ErasureTask
from salun.diffusion.until import Until
from salun.errors import ConfigError
from salun.evaluation.estimate import Unknown, Value
from salun.evaluation.metrics.image_drift import drift_of
from salun.progress import Event, Progress, Stage
from salun.randomness import step_generator

BATCH, FEW, MANY = 8, 24, 128  # images of each concept: at a time; at most on the way; at most at the end
MOST_OTHERS = 64  # images of other prompts, where the first ones are harmed
HOPELESS = 0.05  # confidence at which no more images are needed
ATTACKED = 64  # images under attack at the end; half as many on the way


def until_of(task: ErasureTask, context: RunContext, grow: bool) -> Until | None:
    """The way to the plan's goal; None for a fixed number of steps.

    Where nobody asked for the goal, and no detector can tell the concept, the task gets a fixed number of steps.

    Args:
        grow: Whether more may be sampled.

    Raises:
        ConfigError: The detector cannot tell a concept, and the options name a goal.
    """
    plan = task.plan
    if plan.goal is None:
        return None
    try:
        probe = ModelProbe(task, plan.goal)
    except ConfigError as error:
        if plan.options.until is not None:
            raise
        task.plan = plan.fixed()
        context.note(Stage.TRAINING, f"trains for {plan.recipe.steps} steps: a goal {error.message}")
        if grow:
            task.data = build_training_set(task.model, task.plan, task.progress, cache=context.cache)
        return None
    grow = grow and plan.method.grows
    if grow and plan.all_latents is not None and not plan.options.forget_images:
        task.more = partial(build_training_set, task.model, plan.fixed(), task.progress, cache=context.cache)
    if grow and retain_growth(plan):
        task.more_retain = partial(further_retain, task.model, plan, task.progress, context.cache)
    goal = _measurable(plan.goal, probe, context)
    return Until(
        goal,
        plan.probe_every,
        plan.budget,
        probe,
        task.at_strength,
        len(plan.concepts),
        plan.recipe.lr if plan.lr_given else None,
        guided=plan.method.grows and plan.recipe.target == "frozen",
        redraws=plan.method.grows,
    )


def _measurable(goal: Goal, probe: ModelProbe, context: RunContext) -> Goal:
    """What of the goal the detector can tell; the rest is noted."""
    plan = probe.task.plan
    anchors = probe.detector.anchors
    blind = [each.name for each, of in zip(plan.concepts, anchors, strict=True)
             if of is None and each.anchor and goal.anchor_for(each.name)]  # fmt: skip
    missing = [f"the anchor of {' and '.join(map(repr, blind))}"] if blind else []
    missing += [] if probe.expected else ["whether other images are as prompted (ra_drop)"]
    if missing:
        context.note(Stage.TRAINING, f"the detector {plan.detector} cannot tell {', nor '.join(missing)}")
    goal = goal if any(anchors) else replace(goal, anchor=0.0, anchor_of={})
    return goal if probe.expected else replace(goal, ra_drop=None)


@dataclass(frozen=True, eq=False)
class Look:
    """What a look found, of which the next one at a smaller strength looks at some again.

    Args:
        scores: Of each concept and its anchor in its images, float32 (n, 2).
        others: How many images of other prompts it looked at; 0 for none.
    """

    scores: Sequence[np.ndarray]
    others: int = 0


class ModelProbe:
    """Looks at the live network of a task.

    Args:
        task: Whose network holds the original weights now; its training set calibrates the detector.
        goal: For which confidences are computed.

    Raises:
        ConfigError: The detector cannot detect a concept, or cannot tell it from others on the training set.
    """

    def __init__(self, task: ErasureTask, goal: Goal) -> None:
        self.task, self.goal = task, goal
        self.last, self.images = Look([]), 0
        self._looking()
        self.detector = ConceptDetector(task, goal)
        self.expected = expected_retain(self.detector.detector, self._other_prompts(MOST_OTHERS))
        self.original, self.right = torch.empty(0), list[np.ndarray]()
        self._sample_original(OTHERS, self.detector.calibrating)
        _known(drift_of(self.original, self.original))
        self.predictions = self._predictions()
        self._looking(len(self.original))

    def __call__(self, step: int, *, thorough: bool, drift: bool, grown: bool) -> Probed:
        """Sample held-out prompts until it is clear enough whether the goal holds; see `until.Probe`."""
        self._looking()
        if grown:  # as the step before had it, which a resumed training did not take
            self.task.grow()
        scores = [np.empty((0, 2), np.float32) for _ in self.task.plan.subjects]
        least, most = (MANY // 2, MANY) if thorough else (BATCH, FEW)
        while len(scores[0]) < most:
            images = np.arange(len(scores[0]), len(scores[0]) + BATCH)
            anew = self._scores([images for _ in scores])
            scores = [np.concatenate([old, new]) for old, new in zip(scores, anew, strict=True)]
            concepts = self.detector.seen(scores)
            confidence = min(each.confidence for each in concepts)
            self._looking(len(scores[0]))
            gone = min(each.gone for each in concepts)
            hopeless = (gone if thorough else confidence) <= HOPELESS
            if hopeless or (len(scores[0]) == least and (confidence >= SURE or confidence <= HOPELESS)):
                break  # not asked in between: asked often enough, chance says yes
        self.last = Look(scores)
        probed = Probed(step, concepts)
        if thorough and probed.confidence >= PLAUSIBLE:
            others, probed = self._harmed(probed)
            self.last = Look(scores, len(others))
        elif drift or probed.confidence >= PLAUSIBLE:
            probed = replace(probed, drift=self._drift(self._others(OTHERS // 2)))
        if self.goal.asr is not None and probed.confidence >= PLAUSIBLE:
            probed = replace(probed, asr=self._asr(step, ATTACKED if thorough else ATTACKED // 2, thorough))
        self._looking(len(scores[0]), f"after step {step}: {probed}")
        return probed

    def again(self, step: int, strength: float, *, harm: bool) -> Probed:
        """Sample those images anew that were nearest to showing a concept, or not the anchor; see `until.Probe`.

        The others are taken to show what they did before.
        """
        self._looking()
        scores = [each.copy() for each in self.last.scores]
        nearest = self.detector.nearest(scores)
        for start in range(0, len(nearest[0]), BATCH):
            rows = [each[start : start + BATCH] for each in nearest]
            for each, images, anew in zip(scores, rows, self._scores(rows), strict=True):
                each[images] = anew
            self._looking(start + BATCH)
        probed = Probed(step, self.detector.seen(scores), strength=strength)
        if harm:
            others = self._others(self.last.others or OTHERS)
            probed = replace(probed, drift=self._drift(others), ra_drop=self._ra_drop(others))
        if self.goal.asr is not None and probed.confidence >= PLAUSIBLE:
            probed = replace(probed, asr=self._asr(step, ATTACKED, True))
        self._looking(len(scores[0]), f"after step {step}: {probed}")
        return probed

    def _looking(self, images: int | None = None, message: str = "") -> None:
        """Report that the training is interrupted by a look, at so many images up to now; None: that it begins."""
        self.images = images or 0
        metrics = {"probing": images} if images is not None else {}
        self.task.progress(Event(Stage.TRAINING, metrics=metrics, message=message))

    def _scores(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each concept's and anchor's scores in its images of these numbers, as many of each, below `MANY`."""
        seed, prompts = self.task.plan.options.seed, self.task.plan.prompts.concepts
        texts, seeds = [], []
        for i, (of, numbers) in enumerate(zip(prompts, images, strict=True)):
            rows = spread(MANY, len(of.eval_forget), seed)
            texts += [of.eval_forget[rows[number]].text for number in numbers]
            seeds += [item_seed(seed, "probe", i * MANY + int(number)) for number in numbers]
        seen, each = self.detector.scores(self._sampled(texts, seeds), texts), len(images[0])
        return [scores[i * each : (i + 1) * each] for i, scores in enumerate(seen)]

    def _interrupted(self, event: Event) -> None:
        """Report at each of the sampler's steps that a look continues, so that a host can cancel."""
        self._looking(self.images)

    def _sampled(self, texts: Sequence[str], seeds: Sequence[int], progress: Progress | None = None) -> Tensor:
        """Latents, in fewer of the sampler's steps."""
        model, sampling = self.task.model, self.task.plan.sampling
        with model.sampling_as(of_probes(sampling), (sampling.resolution, sampling.resolution)):
            return sample_latents(model, texts, seeds, progress or self._interrupted)

    def _other_prompts(self, n: int) -> list[Prompt]:
        """n held-out retain prompts, at most `MOST_OTHERS`."""
        prompts, seed = self.task.plan.prompts.eval_retain, self.task.plan.options.seed
        return [prompts[row] for row in spread(MOST_OTHERS, len(prompts), seed)][:n]

    def _others(self, n: int, progress: Progress | None = None, start: int = 0) -> Tensor:
        """Latents of these prompts, from number `start` to n."""
        texts = [prompt.text for prompt in self._other_prompts(n)[start:]]
        seeds = [item_seed(self.task.plan.options.seed, "probe", -1 - i) for i in range(start, n)]
        return self._sampled(texts, seeds, progress).cpu()

    def _sample_original(self, n: int, progress: Progress | None = None) -> None:
        """Have latents of the original for n other prompts, and what is right in them."""
        if n > len(self.original):
            with self.task.original_weights():
                more = self._others(n, progress, len(self.original))
            self.original = torch.cat([self.original, more])
            self.right = self._as_prompted(self.original)

    def _as_prompted(self, others: Tensor) -> list[np.ndarray]:
        """For each attribute, which of the other prompts' images show what they should, bool (n,)."""
        prompts = [prompt.text for prompt in self._other_prompts(len(others))]
        seen = self.detector.detection(others, prompts, compare_prompts=True) if self.expected else None
        return [seen.shows(name, labels[: len(others)]) for name, labels in self.expected.items() if seen is not None]

    def _harmed(self, probed: Probed) -> tuple[Tensor, Probed]:
        """Latents of other prompts, and the probe with the harm that they show; more of them where they show any."""
        others = torch.empty(0)
        for n in (OTHERS, MOST_OTHERS):
            self._sample_original(n)
            others = torch.cat([others, self._others(n, start=len(others))])
            drop = self._ra_drop(others)
            self._looking(n)
            if drop is None or drop <= 0:
                break
        return others, replace(probed, drift=self._drift(others), ra_drop=drop)

    def _ra_drop(self, others: Tensor) -> float | None:
        """See `Probed`."""
        if not self.expected:
            return None
        before = np.concatenate([right[: len(others)] for right in self.right])
        return float(before.mean() - np.concatenate(self._as_prompted(others)).mean())

    @torch.no_grad()
    def _predictions(self, start: int = 0) -> Tensor:
        """On every retain sample from number `start`, noised to the middle of the schedule, under its prompt."""
        model, data, seed = self.task.model, self.task.training_set, self.task.plan.options.seed
        made = []
        for rows in torch.arange(start, len(data.retain_latents)).split(self.task.plan.recipe.batch_size):
            x_0 = data.retain_latents[rows.to(data.retain_latents.device)]
            noise = torch.stack([torch.randn(x_0.shape[1:], generator=step_generator(seed, int(i))) for i in rows])
            t = torch.full((len(rows),), model.schedule.t_at(0.5), device=x_0.device)
            x_t = model.schedule.add_noise(x_0, noise.to(x_0.device), t)
            made.append(model.predict(x_t, t, data.retain[rows.to(x_0.device)]).float().cpu())
        return torch.cat(made)

    def moved(self, *, harmed: bool) -> list[float]:
        """See `until.Probe`."""
        if harmed:
            self.task.grow_retain()
        self._looking()
        known = len(self.predictions)
        if known < len(self.task.training_set.retain_latents):
            with self.task.original_weights():
                self.predictions = torch.cat([self.predictions, self._predictions(known)])
        distances = (self._predictions() - self.predictions).square().flatten(1).mean(1)
        self._looking(len(distances))
        relative: list[float] = (distances / distances.mean().clamp(min=1e-12)).tolist()
        return relative

    def _asr(self, step: int, n: int, anew: bool) -> float:
        """How often adversarial embeddings of the training bring a concept back, at most.

        Args:
            n: Images of each concept.
            anew: Learn an embedding against the network as it is, and look at that too.
        """
        pool, worst = self.task.pool, 0.0
        assert pool is not None
        for i in range(len(self.detector.calibrations)):
            worst = max(worst, self._rate_under(i, [], n))
            if anew:
                worst = max(worst, self._rate_under(i, pool.judge(step, i), n))
            self._looking(n)
        return worst

    def _rate_under(self, concept: int, vectors: Sequence[Tensor], n: int) -> float:
        """Fraction of a concept's images that show it with embeddings of the pool, or others, as its words."""
        pool, model, plan = self.task.pool, self.task.model, self.task.plan
        assert pool is not None
        of, known, sampling = plan.prompts.concepts[concept], self.detector.calibrations[concept], plan.sampling
        texts = [of.eval_forget[row].text for row in spread(n, len(of.eval_forget), plan.options.seed)]
        seeds = [item_seed(plan.options.seed, "attack", concept * MANY + k) for k in range(n)]
        with torch.no_grad(), model.sampling_as(of_probes(sampling), (sampling.resolution, sampling.resolution)):
            latents = sample_conditionings(model, pool.attacking(concept, texts, vectors), seeds)
        return rate_below(known, self.detector.scores(latents, texts)[concept][:, 0], 0.0)[0]

    def _drift(self, others: Tensor) -> float:
        return _known(drift_of(self.original[: len(others)], others))


def _known(drift: Value) -> float:
    """Its number, a large one for images that are not finite. Raises ConfigError if there is none."""
    if isinstance(drift, Unknown):
        raise ConfigError(
            f"needs the drift of other images: {drift.reason}", option="until", advice="Use {steps} instead of {until}"
        )
    return float(drift.value) if np.isfinite(drift.value) else INFINITE
