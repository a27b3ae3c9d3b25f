"""What a detector sees of concepts and anchors in a training's samples, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from salun.detectors import passes_of
from salun.diffusion.data.latents import decode_images
from salun.diffusion.goal import Goal, Seen
from salun.diffusion.losses import ErasureData
from salun.diffusion.stages import KNOWN
from salun.diffusion.task import ErasureTask
from salun.errors import ConfigError
from salun.evaluation.calibration import Calibration, fitting
from salun.evaluation.detector import Detection, Detector, DetectorInputs, Fitted, Samples, load_detector
from salun.progress import Event, Progress, Stage, silent

CERTAIN = 0.8  # probability
NEAREST = 16  # images of each concept, nearest to showing it, or to losing its anchor, that decide about a strength


class ConceptDetector:
    """A detector, calibrated on what a task's original model drew.

    Args:
        task: Whose network holds the original weights now.
        goal: For which probabilities are computed.

    Attributes:
        calibrations: Of each concept.
        anchors: Of each concept's anchor; None where the detector cannot tell it, or the goal does not ask.

    Raises:
        ConfigError: The detector cannot detect a concept, or cannot tell it from others on the training set.
    """

    def __init__(self, task: ErasureTask, goal: Goal) -> None:
        self.task, self.goal = task, goal
        model, plan = task.model, task.plan
        inputs = DetectorInputs(plan.subjects, model.settings.detector, model, model.device)
        self.detector: Detector = load_detector(plan.detector, inputs)
        self.looks = not passes_of(plan.detector)  # at images
        self.adjustable = False
        self.anchors: list[Calibration | None] = []
        self.calibrations = self._calibrated(task.training_set)

    def detection(
        self, latents: Tensor, texts: Sequence[str], progress: Progress = silent, compare_prompts: bool = False
    ) -> Detection:
        """What the detector sees in all of the latents."""
        images = decode_images(self.task.model, latents) if self.looks else np.zeros((len(latents), 1, 1, 3), np.uint8)
        with self.task.original_weights():
            return self.detector.detect(Samples(images, latents.cpu(), texts, compare_prompts), progress)

    def scores(self, latents: Tensor, texts: Sequence[str], progress: Progress = silent) -> list[np.ndarray]:
        """Each concept's and anchor's scores, float32 (n, 2); those of an anchor that cannot be detected are NaN."""
        seen = self.detection(latents, texts, progress)
        self.adjustable = seen.adjustable
        pairs = []
        for of in map(self.detector.target, self.task.plan.subjects):
            assert of is not None
            scores = seen.scores[of.attribute]
            shown = scores[:, of.anchor] if of.anchor is not None else np.full(len(scores), np.nan, np.float32)
            pairs.append(np.stack([scores[:, of.label], shown], 1))
        return pairs

    def seen(self, scores: Sequence[np.ndarray]) -> tuple[Seen, ...]:
        """Of each concept's scores, UA and the probability that it reaches the goal, by Jeffreys' posterior."""
        concepts = []
        of_all = zip(self.task.plan.subjects, self.calibrations, self.anchors, scores, strict=True)
        for subject, concept, anchor, each in of_all:
            rate, gone = rate_below(concept, each[:, 0], 1 - self.goal.of(subject.name), cautious=True)
            seen = Seen(len(each), 1 - rate, gone)
            if anchor is not None:
                rate, fewer = rate_below(anchor, each[:, 1], self.goal.anchor_for(subject.name))
                seen = replace(seen, anchor=rate, shown=1 - fewer)
            concepts.append(seen)
        return tuple(concepts)

    def nearest(self, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each concept, numbers of the images nearest to showing it, and of those nearest to losing its anchor.

        As many of each concept, at most `NEAREST` of both kinds.
        """
        chosen = []
        for each, anchor in zip(scores, self.anchors, strict=True):
            nearest, losing = np.argsort(-each[:, 0], kind="stable"), np.empty(0, int)
            if anchor is not None:
                by_anchor = np.argsort(each[:, 1], kind="stable")
                shown = by_anchor[each[by_anchor, 1] >= anchor.threshold]
                losing = shown[~np.isin(shown, nearest[:NEAREST])][:NEAREST]
            others = nearest[NEAREST:][~np.isin(nearest[NEAREST:], losing)]
            chosen.append((NEAREST + len(losing), np.concatenate([nearest[:NEAREST], losing, others])))
        most = max(count for count, _ in chosen)
        return [order[:most] for _, order in chosen]

    def _calibrated(self, data: ErasureData) -> list[Calibration]:
        """How the detector does on the training set, which the original drew."""
        plan = self.task.plan
        each = len(data.forget_latents) // len(plan.concepts)
        parts = [_some(data.forget_latents[i * each : (i + 1) * each]) for i in range(len(plan.concepts))]
        others = _some(data.retain_latents)
        if isinstance(self.detector, Fitted):
            known = {s.name: _samples(_fitting(part)) for s, part in zip(plan.subjects, parts, strict=True)}
            self.detector.fit(known, _samples(_fitting(others)), self.calibrating)
        negatives = [each[:, 0] for each in self.scores(others, [""] * len(others), self.calibrating)]
        calibrations = []
        for i, (subject, part) in enumerate(zip(plan.subjects, parts, strict=True)):
            scores = self.scores(part, [""] * len(part), self.calibrating)[i]
            calibrated = Calibration.of_fitted if self.adjustable else Calibration.of_scores
            calibration = calibrated(scores[:, 0], negatives[i], self.detector.threshold)
            shown = _some(data.anchor_latents[i * each : (i + 1) * each])
            self.anchors.append(self._anchor_of(i, shown, scores[:, 1]))
            if calibration.reason is not None:
                raise ConfigError(
                    f"needs a detector that can tell {subject.name!r}: {calibration.reason}",
                    option="until",
                    advice="Use another {detector}, or {steps} instead of {until}",
                )
            calibrations.append(calibration)
        return calibrations

    def _anchor_of(self, concept: int, latents: Tensor, without: np.ndarray) -> Calibration | None:
        """How the detector does on a concept's anchor; None where it cannot, or the goal does not ask.

        Args:
            latents: Of the anchor's prompts.
            without: The anchor's scores in images of the concept.
        """
        plan = self.task.plan
        least = self.goal.anchor_for(plan.subjects[concept].name)
        if not least or np.isnan(without).any() or not plan.recipe.anchor_share:
            return None
        scores = self.scores(latents, [""] * len(latents), self.calibrating)[concept][:, 1]
        if isinstance(self.detector, Fitted):
            without = without[~fitting(len(without))]
        calibration = Calibration.of_scores(scores, without, self.detector.threshold)
        return calibration if calibration.reason is None else None

    def calibrating(self, event: Event, /) -> None:
        """Report that the detector is calibrated, whatever that takes."""
        self.task.progress(replace(event, stage=Stage.CALIBRATING))


def rate_below(of: Calibration, scores: np.ndarray, most: float, cautious: bool = False) -> tuple[float, float]:
    """(the rate of images that show something, corrected by its calibration; the probability that it is ≤ most).

    Args:
        cautious: For the probability the detector raises no more false alarms than it does with certainty `CERTAIN`: of
            few images that calibrate it, a single false alarm may be chance, and must not excuse what the model shows.
    """
    seen, false = float(of.positives.mean()), float(of.negatives.mean())
    k, n = int((scores >= of.threshold).sum()), len(scores)
    rate = float(np.clip((k / n - false) / (seen - false), 0, 1))
    least = false
    if cautious:
        theta, below = _posterior(int(of.negatives.sum()), len(of.negatives))
        least = float(np.sin(np.interp(1 - CERTAIN, below, theta)) ** 2)
    return rate, probability_below(least + most * (seen - least), k, n)


def probability_below(limit: float, k: int, n: int) -> float:
    """P(rate ≤ limit) after k of n."""
    theta, below = _posterior(k, n)
    return float(np.interp(np.arcsin(np.sqrt(np.clip(limit, 0.0, 1.0))), theta, below))


def _posterior(k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """θ and P(rate ≤ sin²θ) after k of n, by Jeffreys' posterior Beta(k + ½, n − k + ½), integrated over θ."""
    theta = np.linspace(0, np.pi / 2, 20_001)
    with np.errstate(divide="ignore"):
        logs = 2 * k * np.log(np.sin(theta)) if k else np.zeros_like(theta)
        logs = logs + (2 * (n - k) * np.log(np.cos(theta)) if n > k else 0.0)
    density = np.exp(logs - logs.max()).cumsum()
    return theta, density / density[-1]


def _some(latents: Tensor) -> Tensor:
    """At most `KNOWN` of them, spread evenly."""
    rows = torch.linspace(0, len(latents) - 1, min(KNOWN, len(latents))).round().long()
    return latents[rows.to(latents.device)]


def _fitting(latents: Tensor) -> Tensor:
    """Those that the detector is fitted on; the others calibrate it."""
    return latents[torch.from_numpy(fitting(len(latents))).to(latents.device)]


def _samples(latents: Tensor) -> Samples:
    return Samples(np.zeros((len(latents), 1, 1, 3), np.uint8), latents.cpu(), [""] * len(latents))
