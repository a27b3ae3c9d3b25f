"""A cheap look at a model in training: is the concept gone from held-out prompts, and what else moved?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from salun.detectors import passes_of
from salun.diffusion.context import RunContext
from salun.diffusion.data.latents import decode_images, item_seed, sample_conditionings, sample_latents
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.goal import PLAUSIBLE, SURE, Goal, Probed, Seen
from salun.diffusion.losses import ErasureData
from salun.diffusion.plan import spread
from salun.diffusion.stages import KNOWN, OTHERS, of_probes
from salun.diffusion.task import ErasureTask
from salun.diffusion.until import Until
from salun.errors import ConfigError
from salun.evaluation.calibration import Calibration, fitting
from salun.evaluation.detector import Detector, DetectorInputs, Fitted, Samples, load_detector
from salun.evaluation.estimate import Unknown, Value
from salun.evaluation.metrics.image_drift import drift_of
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator

BATCH, FEW, MANY = 8, 24, 128  # images of each concept: at a time; at most on the way; at most at the end
HOPELESS = 0.05  # confidence at which no more images are needed
NEAREST = 16  # images of each concept, nearest to showing it, that decide about a smaller strength
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
    if grow and plan.all_latents is not None and not plan.options.forget_images:
        task.more = partial(build_training_set, task.model, plan.fixed(), task.progress, cache=context.cache)
    lr = plan.recipe.lr if plan.lr_given else None
    return Until(plan.goal, plan.probe_every, plan.budget, probe, task.at_strength, len(plan.concepts), lr)


@dataclass(frozen=True, eq=False)
class Look:
    """What a look found, of which the next one at a smaller strength looks at some again.

    Args:
        scores: Of each concept, float32 (n,) in its images.
        others: Latents of other prompts' images, on the CPU; None where drift was not measured.
    """

    scores: Sequence[np.ndarray]
    others: Tensor | None = None


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
        model, plan = task.model, task.plan
        inputs = DetectorInputs(plan.subjects, model.settings.detector, model, model.device)
        self.detector: Detector = load_detector(plan.detector, inputs)
        self.looks = not passes_of(plan.detector)  # at images
        self.adjustable, self.last = False, Look([])
        self._looking()
        self.calibrations = self._calibrated(task.training_set)
        self.original = self._others(OTHERS, self._calibrating)
        _known(drift_of(self.original, self.original))
        self.predictions = self._predictions()
        self._looking(len(self.original))

    def __call__(self, step: int, *, thorough: bool, drift: bool) -> Probed:
        """Sample held-out prompts until it is clear enough whether the goal holds; see `until.Probe`."""
        self._looking()
        scores = [np.empty(0, np.float32) for _ in self.task.plan.subjects]
        least, most = (MANY // 2, MANY) if thorough else (BATCH, FEW)
        while len(scores[0]) < most:
            images = np.arange(len(scores[0]), len(scores[0]) + BATCH)
            anew = self._scores([images for _ in scores])
            scores = [np.append(old, new) for old, new in zip(scores, anew, strict=True)]
            concepts = self._seen(scores)
            confidence = min(each.confidence for each in concepts)
            self._looking(len(scores[0]))
            if confidence <= HOPELESS or (len(scores[0]) >= least and confidence >= SURE):
                break
        self.last = Look(scores)
        probed = Probed(step, concepts)
        if drift or probed.confidence >= PLAUSIBLE:
            others = self._others(OTHERS if thorough else OTHERS // 2)
            self.last, probed = Look(scores, others), replace(probed, drift=self._drift(others))
        if self.goal.asr is not None and probed.confidence >= PLAUSIBLE:
            probed = replace(probed, asr=self._asr(step, ATTACKED if thorough else ATTACKED // 2, thorough))
        self._looking(len(scores[0]), f"after step {step}: {probed}")
        return probed

    def again(self, step: int, strength: float, *, drift: bool) -> Probed:
        """Sample those images anew that were nearest to showing a concept; see `until.Probe`.

        The others are taken to show as much of it as before. Drift is measured on half of the images, relative to
        theirs before.
        """
        self._looking()
        scores = [each.copy() for each in self.last.scores]
        nearest = [np.argsort(-each, kind="stable")[:NEAREST] for each in scores]
        for start in range(0, min(len(each) for each in nearest), BATCH):
            rows = [each[start : start + BATCH] for each in nearest]
            for each, images, anew in zip(scores, rows, self._scores(rows), strict=True):
                each[images] = anew
            self._looking(start + BATCH)
        probed = Probed(step, self._seen(scores), strength=strength)
        if drift:
            assert self.last.others is not None
            now, before = self._others(OTHERS // 2), self._drift(self.last.others[: OTHERS // 2])
            change = self._drift(now) / before if before else 1.0
            probed = replace(probed, drift=self._drift(self.last.others) * change)
        if self.goal.asr is not None and probed.confidence >= PLAUSIBLE:
            probed = replace(probed, asr=self._asr(step, ATTACKED, True))
        self._looking(len(scores[0]), f"after step {step}: {probed}")
        return probed

    def _looking(self, images: int = 0, message: str = "") -> None:
        """Report that the training is interrupted by a look at images."""
        self.task.progress(Event(Stage.TRAINING, metrics={"probing": images} if images else {}, message=message))

    def _calibrating(self, event: Event, /) -> None:
        """Report that the detector is calibrated, whatever that takes."""
        self.task.progress(replace(event, stage=Stage.CALIBRATING))

    def _seen(self, scores: Sequence[np.ndarray]) -> tuple[Seen, ...]:
        """Of each concept's scores, UA and the probability that it reaches the goal, by Jeffreys' posterior."""
        concepts = []
        for subject, of, each in zip(self.task.plan.subjects, self.calibrations, scores, strict=True):
            seen, false = float(of.positives.mean()), float(of.negatives.mean())
            allowed = false + (1 - self.goal.of(subject.name)) * (seen - false)
            k, n = int((each >= of.threshold).sum()), len(each)
            ua = float(np.clip(1 - (k / n - false) / (seen - false), 0, 1))
            concepts.append(Seen(n, ua, probability_below(allowed, k, n)))
        return tuple(concepts)

    def _scores(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each concept's scores in its images of these numbers, as many of each concept, below `MANY`."""
        seed, prompts = self.task.plan.options.seed, self.task.plan.prompts.concepts
        texts, seeds = [], []
        for i, (of, numbers) in enumerate(zip(prompts, images, strict=True)):
            rows = spread(MANY, len(of.eval_forget), seed)
            texts += [of.eval_forget[rows[number]].text for number in numbers]
            seeds += [item_seed(seed, "probe", i * MANY + int(number)) for number in numbers]
        seen, each = self._detect(self._sampled(texts, seeds), texts), len(images[0])
        return [scores[i * each : (i + 1) * each] for i, scores in enumerate(seen)]

    def _sampled(self, texts: Sequence[str], seeds: Sequence[int], progress: Progress = silent) -> Tensor:
        """Latents, in fewer of the sampler's steps."""
        model, sampling = self.task.model, self.task.plan.sampling
        with model.sampling_as(of_probes(sampling), (sampling.resolution, sampling.resolution)):
            return sample_latents(model, texts, seeds, progress)

    def _detect(self, latents: Tensor, texts: Sequence[str], progress: Progress = silent) -> list[np.ndarray]:
        """Each concept's scores, float32 (n,), in all of the latents."""
        images = decode_images(self.task.model, latents) if self.looks else np.zeros((len(latents), 1, 1, 3), np.uint8)
        with self.task.original_weights():
            seen = self.detector.detect(Samples(images, latents.cpu(), texts), progress)
        self.adjustable = seen.adjustable
        targets = [self.detector.target(subject) for subject in self.task.plan.subjects]
        return [seen.scores[of.attribute][:, of.label] for of in targets if of is not None]

    def _calibrated(self, data: ErasureData) -> list[Calibration]:
        """How the detector does on the training set, which the original drew."""
        plan = self.task.plan
        each = len(data.forget_latents) // len(plan.concepts)
        parts = [_some(data.forget_latents[i * each : (i + 1) * each]) for i in range(len(plan.concepts))]
        others = _some(data.retain_latents)
        if isinstance(self.detector, Fitted):
            known = {s.name: _samples(_fitting(part)) for s, part in zip(plan.subjects, parts, strict=True)}
            self.detector.fit(known, _samples(_fitting(others)), self._calibrating)
        negatives = self._detect(others, [""] * len(others), self._calibrating)
        calibrations = []
        for i, (subject, part) in enumerate(zip(plan.subjects, parts, strict=True)):
            positives = self._detect(part, [""] * len(part), self._calibrating)[i]
            calibrated = Calibration.of_fitted if self.adjustable else Calibration.of_scores
            calibration = calibrated(positives, negatives[i], self.detector.threshold)
            if calibration.reason is not None:
                raise ConfigError(
                    f"needs a detector that can tell {subject.name!r}: {calibration.reason}",
                    option="until",
                    advice="Use another {detector}, or {steps} instead of {until}",
                )
            calibrations.append(calibration)
        return calibrations

    def _others(self, n: int, progress: Progress = silent) -> Tensor:
        """Latents of held-out retain prompts."""
        prompts, seed = self.task.plan.prompts.eval_retain, self.task.plan.options.seed
        texts = [prompts[row].text for row in spread(OTHERS, len(prompts), seed)][:n]
        return self._sampled(texts, [item_seed(seed, "probe", -1 - i) for i in range(n)], progress).cpu()

    @torch.no_grad()
    def _predictions(self) -> Tensor:
        """On every retain sample, noised to the middle of the schedule, under its prompt: (m, c, h, w)."""
        model, data, seed = self.task.model, self.task.training_set, self.task.plan.options.seed
        made = []
        for rows in torch.arange(len(data.retain_latents)).split(self.task.plan.recipe.batch_size):
            x_0 = data.retain_latents[rows.to(data.retain_latents.device)]
            noise = torch.stack([torch.randn(x_0.shape[1:], generator=step_generator(seed, int(i))) for i in rows])
            t = torch.full((len(rows),), model.schedule.t_at(0.5), device=x_0.device)
            x_t = model.schedule.add_noise(x_0, noise.to(x_0.device), t)
            made.append(model.predict(x_t, t, data.retain[rows.to(x_0.device)]).float().cpu())
        return torch.cat(made)

    def moved(self) -> list[float]:
        """See `until.Probe`."""
        self._looking()
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
        for i in range(len(self.calibrations)):
            worst = max(worst, self._rate_under(i, [], n))
            if anew:
                worst = max(worst, self._rate_under(i, pool.judge(step, i), n))
            self._looking(n)
        return worst

    def _rate_under(self, concept: int, vectors: Sequence[Tensor], n: int) -> float:
        """Fraction of a concept's images that show it with embeddings of the pool, or others, as its words."""
        pool, model, plan = self.task.pool, self.task.model, self.task.plan
        assert pool is not None
        of, known, sampling = plan.prompts.concepts[concept], self.calibrations[concept], plan.sampling
        texts = [of.eval_forget[row].text for row in spread(n, len(of.eval_forget), plan.options.seed)]
        seeds = [item_seed(plan.options.seed, "attack", concept * MANY + k) for k in range(n)]
        with torch.no_grad(), model.sampling_as(of_probes(sampling), (sampling.resolution, sampling.resolution)):
            latents = sample_conditionings(model, pool.attacking(concept, texts, vectors), seeds)
        shown = self._detect(latents, texts)[concept] >= known.threshold
        p1, p0 = float(known.positives.mean()), float(known.negatives.mean())
        return float(np.clip((shown.mean() - p0) / (p1 - p0), 0, 1))

    def _drift(self, others: Tensor) -> float:
        return _known(drift_of(self.original[: len(others)], others))


def _known(drift: Value) -> float:
    """Its number. Raises ConfigError if there is none."""
    if isinstance(drift, Unknown):
        raise ConfigError(
            f"needs the drift of other images: {drift.reason}", option="until", advice="Use {steps} instead of {until}"
        )
    return float(drift.value)


def probability_below(limit: float, k: int, n: int) -> float:
    """P(rate ≤ limit) after k of n, by Jeffreys' posterior Beta(k + ½, n − k + ½), integrated over θ, rate = sin²θ."""
    theta = np.linspace(0, np.pi / 2, 20_001)
    with np.errstate(divide="ignore"):
        logs = 2 * k * np.log(np.sin(theta)) if k else np.zeros_like(theta)
        logs = logs + (2 * (n - k) * np.log(np.cos(theta)) if n > k else 0.0)
    density = np.exp(logs - logs.max())
    below = theta <= np.arcsin(np.sqrt(np.clip(limit, 0.0, 1.0)))
    return float(density[below].sum() / density.sum())


def _some(latents: Tensor) -> Tensor:
    """At most `KNOWN` of them, spread evenly."""
    rows = torch.linspace(0, len(latents) - 1, min(KNOWN, len(latents))).round().long()
    return latents[rows.to(latents.device)]


def _fitting(latents: Tensor) -> Tensor:
    """Those that the detector is fitted on; the others calibrate it."""
    return latents[torch.from_numpy(fitting(len(latents))).to(latents.device)]


def _samples(latents: Tensor) -> Samples:
    return Samples(np.zeros((len(latents), 1, 1, 3), np.uint8), latents.cpu(), [""] * len(latents))
