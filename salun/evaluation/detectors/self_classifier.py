"""The original model as a classifier of latents: it knows every concept that it can draw, and needs no download.

A diffusion model denoises a sample best under the prompt that describes it (Li et al. 2023, "Your diffusion model is
secretly a zero-shot classifier"). For a latent x₀ the original network's error ‖target − output(x_t, t, c)‖² is
compared between the concept's prompt, the anchor's and the empty one, on the same (t, ε). The empty prompt is needed:
with concept and anchor alone, whatever is neither is taken for one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
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
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator

FRACTIONS = (0.15, 0.4, 0.25, 0.5)  # of the schedule: the timesteps t, in the order in which they are tried
ENOUGH = 2  # timesteps that must agree; where they do not, the others decide too
SEED = 17  # of ε, which all samples share
PROMPT, AS_PROMPTED = "prompt", "as prompted"


class _Question:
    """Which of several prompts describes each sample best, decided as far as the errors so far decide it.

    Args:
        candidates: int64 (n, m), a prompt's row among the encoded ones, for each sample.
    """

    def __init__(self, candidates: Tensor) -> None:
        n, m = candidates.shape
        self.candidates, self.total, self.count = candidates, torch.zeros(n, m), torch.zeros(n)
        self.best = torch.full((n,), -1)
        self.undecided = torch.ones(n, dtype=torch.bool)

    def pairs(self) -> Tensor:
        """int64 (k, 2): (sample, prompt) whose errors are to be found, m for each undecided sample."""
        rows = self.undecided.nonzero()[:, 0]
        return torch.stack([rows[:, None].expand(-1, self.candidates.shape[1]), self.candidates[rows]], 2).flatten(0, 1)

    def add(self, errors: Tensor) -> None:
        """errors: (k,), of `pairs` at one more timestep. A sample is decided where `ENOUGH` timesteps agree."""
        rows = self.undecided.nonzero()[:, 0]
        errors = errors.view(len(rows), self.candidates.shape[1])
        self.total[rows] += errors / errors.mean(1, keepdim=True)
        best, first = errors.argmin(1), self.count[rows] == 0
        agree = first | (self.best[rows] == best)
        self.best[rows] = torch.where(first, best, torch.where(agree, best, -2))
        self.count[rows] += 1
        self.undecided[rows] = ~agree | (self.count[rows] < ENOUGH)

    def margins(self) -> Tensor:
        """(n, m): of each prompt the smallest mean error of another one minus its own."""
        return margins(-self.total / self.count[:, None])


class SelfClassifier:
    """Compares the original network's errors under several prompts.

    Args:
        model: With its original weights whenever `detect` runs.
        subjects: The concepts.
    """

    name, version = "self", "1"
    threshold, unit = 0.0, "error of the best other prompt minus the label's, relative to their mean"
    prompt_match = PROMPT

    def __init__(self, model: DiffusionModel, subjects: Sequence[Subject]) -> None:
        self.model, self.subjects = model, subjects
        self.labels: Mapping[str, Sequence[str]] = labels_by_concept(subjects) | {PROMPT: [AS_PROMPTED]}

    @property
    def sha256(self) -> str:
        """The base hash of the original model."""
        return self.model.base_hash

    def target(self, subject: Subject) -> Target | None:
        """An attribute of its own, with the concept and its anchor as labels."""
        return target_by_concept(subject, self.labels)

    @torch.no_grad()
    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """In the latents of n samples; the images are not looked at."""
        n, parts = len(samples), []
        compared = self._questions(samples)
        texts = list(dict.fromkeys(text for columns in compared.values() for column in columns for text in column))
        encoded, row_of = self.model.encode(texts or [""]), {text: i for i, text in enumerate(texts)}
        rows = {
            name: torch.tensor([[row_of[text] for text in column] for column in of]).T for name, of in compared.items()
        }
        size = batch_size_of(self.model)
        for start in range(0, n, size):
            questions = {name: _Question(candidates[start : start + size]) for name, candidates in rows.items()}
            self._decide(samples.latents[start : start + size].to(self.model.device), encoded, questions.values())
            parts.append({name: question.margins() for name, question in questions.items()})
            progress(Event(Stage.DETECTING, min(start + size, n), n))
        return Detection(
            {
                name: torch.cat([part[name] for part in parts])[:, : len(labels)].numpy()
                if name in compared and parts
                else np.full((n, len(labels)), -np.inf, np.float32)
                for name, labels in self.labels.items()
            },
            self.threshold,
            adjustable=True,
        )

    def _questions(self, samples: Samples) -> dict[str, list[list[str]]]:
        """Attribute → the prompts to compare for each sample, in columns: those of its labels, then others."""
        n, prompts = len(samples), samples.prompts
        compared = {}
        for each in self.subjects:
            phrases = [each.phrase, *([each.anchor_phrase] if each.anchor else []), ""]
            compared[each.name] = [[phrase] * n for phrase in phrases]
        if samples.compare_prompts:
            compared[PROMPT] = [list(prompts), [foil_of(i, prompts) for i in range(n)], [""] * n]
        return compared

    def _decide(self, latents: Tensor, encoded: Conditioning, questions: Collection[_Question]) -> None:
        """Add errors to the questions until each is decided for each sample, or the timesteps are used up."""
        for k, fraction in enumerate(FRACTIONS):
            noise = torch.randn(self.model.latent_shape, generator=step_generator(SEED, k))
            wanted = [question.pairs() for question in questions]
            pairs, inverse = torch.unique(torch.cat(wanted), dim=0, return_inverse=True)
            if not len(pairs):
                break
            errors = self._errors(latents, encoded, pairs, fraction, noise)[inverse]
            for question, part in zip(questions, errors.split([len(each) for each in wanted]), strict=True):
                question.add(part)

    def _errors(self, latents: Tensor, encoded: Conditioning, pairs: Tensor, fraction: float, noise: Tensor) -> Tensor:
        """Mean squared errors (k,) of (sample, prompt) pairs (k, 2) at one timestep, with one noise (c, h, w)."""
        model, parts = self.model, []
        for part in pairs.to(latents.device).split(2 * len(latents)):
            x_0 = latents[part[:, 0]]
            t = torch.full((len(part),), model.schedule.t_at(fraction), device=latents.device)
            noises = noise.to(latents.device).expand_as(x_0)
            output = model.predict(model.schedule.add_noise(x_0, noises, t), t, encoded[part[:, 1]])
            parts.append((output - model.schedule.target(x_0, noises, t)).square().flatten(1).mean(1).cpu())
        return torch.cat(parts)


def foil_of(i: int, prompts: Sequence[str]) -> str:
    """Another prompt than the i-th: the next one that differs, or the empty prompt where all are equal."""
    n = len(prompts)
    return next((prompts[(i + k) % n] for k in range(1, n) if prompts[(i + k) % n] != prompts[i]), "")


def load(inputs: DetectorInputs) -> SelfClassifier | None:
    """The original model as detector; None where there are only images."""
    return SelfClassifier(inputs.original, inputs.subjects) if inputs.original is not None else None
