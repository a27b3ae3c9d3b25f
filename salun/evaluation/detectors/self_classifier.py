"""The original model as a classifier of latents: it knows every concept that it can draw, and needs no download.

A diffusion model denoises a sample best under the prompt that describes it (Li et al. 2023, "Your diffusion model is
secretly a zero-shot classifier"). For a latent x₀ the original network's error ‖target − output(x_t, t, c)‖² is
compared between the concept's prompt, the anchor's and the empty one, on the same (t, ε). The empty prompt is needed:
with concept and anchor alone, whatever is neither is taken for one of them.

Which t separates a concept from others depends on the concept: shapes and colors show in little noise, styles in much.
So the timesteps are chosen on the original's own images (`fit`), where it is known what they show. So is the range of
scores in which a second noise, −ε, could change the decision: only images in that range get it.

Whether an image shows what its whole prompt says is decided against the empty prompt, at little, medium and much noise:
the prompt must be the better one at each, as a wrong color shows in little noise alone and a wrong style in much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
from salun.evaluation.calibration import FEWEST, FITTED, MANY, adjusted, auc, fitting_rounds
from salun.evaluation.detector import (
    Detection,
    DetectorInputs,
    Samples,
    Subject,
    Target,
    labels_by_concept,
    target_by_concept,
)
from salun.evaluation.detectors.attribute import margins
from salun.progress import Event, Progress, Stage, in_parts, silent
from salun.randomness import step_generator

FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92)  # of the schedule: the timesteps t to choose from
UNFITTED: tuple[float, ...] = (0.2, 0.5, 0.8)  # those that are used without a choice
MATCHED = UNFITTED  # at each of which a whole prompt must be better than the empty one
MOST, BETTER = 2, 0.005  # timesteps at most; by how much another one must raise the AUC
SEED = 17  # of ε, which all samples share, as they do −ε
PROMPT, AS_PROMPTED = "prompt", "as prompted"
ANY = (-math.inf, math.inf)


class SelfClassifier:
    """Compares the original network's errors under several prompts.

    Args:
        model: With its original weights whenever `fit` or `detect` runs.
        subjects: The concepts.
    """

    name, version = "self", "6"
    threshold, unit = 0.0, "error of the best other prompt minus the label's, relative to their mean"
    prompt_match = PROMPT

    def __init__(self, model: DiffusionModel, subjects: Sequence[Subject]) -> None:
        self.model, self.subjects = model, subjects
        self.labels: Mapping[str, Sequence[str]] = labels_by_concept(subjects) | {PROMPT: [AS_PROMPTED]}
        self.timesteps: dict[str, tuple[float, ...]] = dict.fromkeys(self.labels, UNFITTED) | {PROMPT: MATCHED}
        self.open = {each.name: ANY for each in subjects}  # the range of scores that need −ε too

    @property
    def sha256(self) -> str:
        """The base hash of the original model."""
        return self.model.base_hash

    def target(self, subject: Subject) -> Target | None:
        """An attribute of its own, with the concept and its anchor as labels."""
        return target_by_concept(subject, self.labels)

    @property
    def facts(self) -> dict[str, str]:
        """The timesteps by which each question is decided, as fractions of the schedule."""
        return {"timesteps": "; ".join(f"{name}: {', '.join(map(str, t))}" for name, t in self.timesteps.items())}

    def fit(self, shows: Mapping[str, Samples], others: Samples, progress: Progress = silent) -> None:
        """Choose for each concept the timesteps that tell most, and where a second noise is needed.

        Args:
            shows: Concept → images of it by the original; some of them are used.
            others: Images of other prompts.
        """
        negatives = some_of(others, MANY)
        positives = {each.name: some_of(shows[each.name], MANY) for each in self.subjects}
        positives = {name: of for name, of in positives.items() if min(len(of), len(negatives)) >= FEWEST}
        rounds = [size for of in positives.values() for size in fitting_rounds(len(of), len(negatives))]
        parts = in_parts(progress, rounds)
        for name, of in positives.items():
            self._choose(name, (of, negatives), parts)

    def _choose(self, name: str, kinds: tuple[Samples, Samples], parts: Iterator[Progress]) -> None:
        """By successive halving: all timesteps on few images of both kinds, the likely ones on more, the best on all.

        Args:
            kinds: Images that show the concept, and others.
            parts: A progress for each of the `fitting_rounds`.
        """

        def errors(fractions: Sequence[float], most: int, noise: int = 1) -> list[Tensor]:
            measured = []
            for of in (some_of(of, most) for of in kinds):
                asked, at = self._questions(of)[name], {name: fractions}
                errors = self._measured(of.latents, {name: asked}, at, noise, Stage.CALIBRATING, next(parts))
                measured.append(errors[name])
            return measured

        likely = likely_timesteps(*errors(FRACTIONS, FEWEST))
        first = errors(likely, FITTED)
        chosen = best_timesteps(first[0], first[1], likely)
        if max(map(len, kinds)) > FITTED:
            first = errors(chosen, MANY)
        else:
            first = [each[:, :, [likely.index(t) for t in chosen]] for each in first]
        second = errors(chosen, MANY, -1)
        both = [scores_of((one + other) / 2)[:, 0] for one, other in zip(first, second, strict=True)]
        moved = [(scores_of(one)[:, 0] - of).abs().max() for one, of in zip(first, both, strict=True)]
        threshold, width = adjusted(both[0].numpy(), both[1].numpy(), self.threshold), float(max(moved))
        self.timesteps[name], self.open[name] = chosen, (threshold - width, threshold + width)

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """In the latents of n samples; the images are not looked at."""
        latents, asked, stage = samples.latents, self._questions(samples), Stage.DETECTING
        errors = self._measured(latents, asked, self.timesteps, 1, stage, progress)
        for name, (low, high) in self.open.items():
            score = scores_of(errors[name])[:, 0]
            rows = torch.nonzero((score >= low) & (score <= high)).flatten()
            if not len(rows):
                continue
            again = {name: [[column[i] for i in rows.tolist()] for column in asked[name]]}
            second = self._measured(latents[rows], again, self.timesteps, -1, stage, progress, len(samples))
            errors[name][rows] = (errors[name][rows] + second[name]) / 2
        scores = {name: scores_of(of)[:, : len(self.labels[name])] for name, of in errors.items() if name != PROMPT}
        unknown = torch.full((len(samples), 1), -torch.inf)
        scores[PROMPT] = least_scores_of(errors[PROMPT])[:, :1] if PROMPT in errors else unknown
        return Detection({name: of.numpy() for name, of in scores.items()}, self.threshold, adjustable=True)

    def _questions(self, samples: Samples) -> dict[str, list[list[str]]]:
        """Attribute → the prompts to compare for each sample, in columns: those of its labels, then others."""
        n, prompts = len(samples), samples.prompts
        compared = {}
        for each in self.subjects:
            phrases = [each.phrase, *([each.anchor_phrase] if each.anchor else []), ""]
            compared[each.name] = [[phrase] * n for phrase in phrases]
        if samples.compare_prompts:
            compared[PROMPT] = [list(prompts), [""] * n]
        return compared

    @torch.no_grad()
    def _measured(
        self,
        latents: Tensor,
        compared: Mapping[str, list[list[str]]],
        timesteps: Mapping[str, Sequence[float]],
        noise: int,
        stage: Stage,
        progress: Progress,
        total: int | None = None,
    ) -> dict[str, Tensor]:
        """Attribute → errors (n, prompts, timesteps) of n latents, the prompts of `compared` at its `timesteps`.

        Args:
            noise: 1 for ε, −1 for −ε.
            total: Of the progress, where it is complete already: these were counted before.
        """
        n, size = len(latents), batch_size_of(self.model)
        texts = list(dict.fromkeys(text for columns in compared.values() for column in columns for text in column))
        encoded, row_of = self.model.encode(texts or [""]), {text: i for i, text in enumerate(texts)}
        rows = {
            name: torch.tensor([[row_of[text] for text in column] for column in of]).T for name, of in compared.items()
        }
        errors = {name: torch.zeros(n, len(of), len(timesteps[name])) for name, of in compared.items()}
        for start in range(0, n, size):
            batch = slice(start, start + size)
            part = latents[batch].to(self.model.device)
            for fraction in FRACTIONS:
                names = [name for name in compared if fraction in timesteps[name]]
                pairs = [_pairs(rows[name][batch]) for name in names]
                if not pairs:
                    continue
                unique, inverse = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
                at_t = self._at(part, encoded, unique, fraction, noise)[inverse]
                for name, of in zip(names, at_t.split([len(each) for each in pairs]), strict=True):
                    errors[name][batch, :, list(timesteps[name]).index(fraction)] = of.view(len(part), -1)
            progress(Event(stage, total or min(start + size, n), total or n))
        return errors

    def _at(self, latents: Tensor, encoded: Conditioning, pairs: Tensor, fraction: float, sign: int) -> Tensor:
        """Mean squared errors (k,) of (sample, prompt) pairs (k, 2) at one timestep, for ε or −ε.

        The mean over both takes out what is linear in the noise: it separates better than two independent ones.
        """
        model, parts = self.model, []
        drawn = sign * torch.randn(latents.shape[1:], generator=step_generator(SEED, FRACTIONS.index(fraction)))
        for part in pairs.to(latents.device).split(2 * len(latents)):
            x_0, noise = latents[part[:, 0]], drawn.to(latents.device).expand(len(part), -1, -1, -1)
            t = torch.full((len(x_0),), model.schedule.t_at(fraction), device=latents.device)
            output = model.predict(model.schedule.add_noise(x_0, noise, t), t, encoded[part[:, 1]])
            errors = (output - model.schedule.target(x_0, noise, t)).square().flatten(1).mean(1)
            parts.append(errors.cpu())
        return torch.cat(parts)


def _pairs(rows: Tensor) -> Tensor:
    """int64 (b · m, 2): (sample, prompt) of a batch. rows: int64 (b, m), each sample's prompts."""
    return torch.stack([torch.arange(len(rows))[:, None].expand_as(rows), rows], 2).flatten(0, 1)


def some_of(samples: Samples, most: int) -> Samples:
    """At most `most` of them, spread evenly."""
    return samples[np.unique(np.linspace(0, len(samples) - 1, most).round().astype(int)) if len(samples) else []]


def scores_of(errors: Tensor) -> Tensor:
    """(n, prompts): of each prompt the smallest error of another one minus its own, relative to their mean.

    Args:
        errors: (n, prompts, timesteps); each timestep counts the same, however large its errors are.
    """
    return margins(-(errors / errors.mean(1, keepdim=True)).mean(2))


def least_scores_of(errors: Tensor) -> Tensor:
    """(n, prompts): of each prompt the least of its scores at single timesteps; arguments as in `scores_of`."""
    return torch.stack([scores_of(each) for each in errors.split(1, 2)]).amin(0)


def quality(positives: Tensor, negatives: Tensor, chosen: Sequence[int]) -> tuple[float, float]:
    """How well the scores at some timesteps separate two kinds of images, of which the first show the first prompt.

    Args:
        positives, negatives: Errors (n, prompts, timesteps).
        chosen: Numbers of timesteps.

    Returns:
        The AUC, and the distance of the means in units of their spread, which decides among equals.
    """
    sides = [scores_of(errors[:, :, list(chosen)])[:, 0] for errors in (positives, negatives)]
    apart = (sides[0].mean() - sides[1].mean()) / (sides[0].var() + sides[1].var() + 1e-12).sqrt()
    return auc(sides[0].numpy(), sides[1].numpy()), float(apart)


def likely_timesteps(positives: Tensor, negatives: Tensor) -> tuple[float, ...]:
    """The `MOST` timesteps of `FRACTIONS` that are best alone; arguments as in `quality`."""
    ranked = sorted(range(len(FRACTIONS)), key=lambda k: quality(positives, negatives, [k]), reverse=True)
    return tuple(FRACTIONS[k] for k in sorted(ranked[:MOST]))


def best_timesteps(positives: Tensor, negatives: Tensor, fractions: Sequence[float]) -> tuple[float, ...]:
    """The best one of the timesteps `fractions` in `quality`, or more where that raises the AUC by `BETTER`."""
    chosen: list[int] = []
    for _ in fractions:
        others = [k for k in range(len(fractions)) if k not in chosen]
        more = [*chosen, max(others, key=lambda k: quality(positives, negatives, [*chosen, k]))]
        if chosen and quality(positives, negatives, more)[0] < quality(positives, negatives, chosen)[0] + BETTER:
            break
        chosen = more
    return tuple(fractions[k] for k in sorted(chosen))


def load(inputs: DetectorInputs) -> SelfClassifier | None:
    """The original model as detector; None where there are only images."""
    return SelfClassifier(inputs.original, inputs.subjects) if inputs.original is not None else None
