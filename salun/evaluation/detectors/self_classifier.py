"""The original model as a classifier of latents: it knows every concept that it can draw, and needs no download.

A diffusion model denoises a sample best under the prompt that describes it (Li et al. 2023, "Your diffusion model is
secretly a zero-shot classifier"). For a latent x₀ the original network's error ‖target − output(x_t, t, c)‖² is
compared between the concept's prompt, the anchor's and the empty one, on the same (t, ±ε). The empty prompt is needed:
with concept and anchor alone, whatever is neither is taken for one of them.

Which t separates a concept from others depends on the concept: shapes and colors show in little noise, styles in much.
So the timesteps are chosen on the original's own images (`fit`), where it is known what they show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
from salun.evaluation.calibration import FEWEST, FITTED, auc
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
UNFITTED = (0.2, 0.5, 0.8)  # those that are used without a choice
MOST, BETTER = 3, 0.005  # timesteps at most; by how much another one must raise the AUC
SEED = 17  # of ε, which all samples share, as they do −ε
PROMPT, AS_PROMPTED = "prompt", "as prompted"


class SelfClassifier:
    """Compares the original network's errors under several prompts.

    Args:
        model: With its original weights whenever `fit` or `detect` runs.
        subjects: The concepts.
    """

    name, version = "self", "3"
    threshold, unit = 0.0, "error of the best other prompt minus the label's, relative to their mean"
    prompt_match = PROMPT

    def __init__(self, model: DiffusionModel, subjects: Sequence[Subject]) -> None:
        self.model, self.subjects = model, subjects
        self.labels: Mapping[str, Sequence[str]] = labels_by_concept(subjects) | {PROMPT: [AS_PROMPTED]}
        self.timesteps: dict[str, tuple[float, ...]] = dict.fromkeys(self.labels, UNFITTED)

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
        """Choose the timesteps that tell most on images of the original, some of each kind.

        Args:
            shows: Concept → images of it.
            others: Images of other prompts.
        """
        negatives = some_of(others)
        positives = {each.name: some_of(shows[each.name]) for each in self.subjects}
        positives = {name: of for name, of in positives.items() if len(of) >= FEWEST}
        if len(negatives) < FEWEST:
            return
        sizes = [n for of in positives.values() for n in (len(of), len(negatives))]
        parts = in_parts(progress, [*sizes, *[len(negatives)] * negatives.compare_prompts])
        for name, of in positives.items():
            shown, absent = (self._errors(part, name, next(parts)) for part in (of, negatives))
            self.timesteps[name] = best_timesteps(shown, absent, (0, 0))
        if negatives.compare_prompts:
            errors = self._errors(negatives, PROMPT, next(parts))
            self.timesteps[PROMPT] = best_timesteps(errors, errors, (0, 1))  # an image does not show the foil

    def _errors(self, samples: Samples, name: str, progress: Progress) -> Tensor:
        """Errors (n, prompts, timesteps) for one question at all timesteps."""
        compared = self._questions(samples)[name]
        return self._measured(samples, {name: compared}, {name: FRACTIONS}, Stage.CALIBRATING, progress)[name]

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """In the latents of n samples; the images are not looked at."""
        compared = self._questions(samples)
        errors = self._measured(samples, compared, self.timesteps, Stage.DETECTING, progress)
        return Detection(
            {
                name: scores_of(errors[name])[:, : len(labels)].numpy()
                if name in errors
                else np.full((len(samples), len(labels)), -np.inf, np.float32)
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

    @torch.no_grad()
    def _measured(
        self,
        samples: Samples,
        compared: Mapping[str, list[list[str]]],
        timesteps: Mapping[str, Sequence[float]],
        stage: Stage,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Attribute → errors (n, prompts, timesteps), the prompts of `compared` at its `timesteps`."""
        n, size = len(samples), batch_size_of(self.model)
        texts = list(dict.fromkeys(text for columns in compared.values() for column in columns for text in column))
        encoded, row_of = self.model.encode(texts or [""]), {text: i for i, text in enumerate(texts)}
        rows = {
            name: torch.tensor([[row_of[text] for text in column] for column in of]).T for name, of in compared.items()
        }
        errors = {name: torch.zeros(n, len(of), len(timesteps[name])) for name, of in compared.items()}
        for start in range(0, n, size):
            batch = slice(start, start + size)
            latents = samples.latents[batch].to(self.model.device)
            for fraction in FRACTIONS:
                names = [name for name in compared if fraction in timesteps[name]]
                pairs = [_pairs(rows[name][batch]) for name in names]
                if not pairs:
                    continue
                unique, inverse = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
                at_t = self._at(latents, encoded, unique, fraction)[inverse]
                for name, part in zip(names, at_t.split([len(each) for each in pairs]), strict=True):
                    errors[name][batch, :, list(timesteps[name]).index(fraction)] = part.view(len(latents), -1)
            progress(Event(stage, min(start + size, n), n))
        return errors

    def _at(self, latents: Tensor, encoded: Conditioning, pairs: Tensor, fraction: float) -> Tensor:
        """Mean squared errors (k,) of (sample, prompt) pairs (k, 2) at one timestep, for a noise and its negative.

        Such an antithetic pair takes out what is linear in the noise: it separates better than two independent ones.
        """
        model, parts = self.model, []
        drawn = torch.randn(latents.shape[1:], generator=step_generator(SEED, FRACTIONS.index(fraction)))
        for part in pairs.to(latents.device).split(len(latents)):
            x_0 = latents[part[:, 0]].repeat(2, 1, 1, 1)
            noise = torch.cat([each.to(latents.device).expand(len(part), -1, -1, -1) for each in (drawn, -drawn)])
            t = torch.full((len(x_0),), model.schedule.t_at(fraction), device=latents.device)
            output = model.predict(model.schedule.add_noise(x_0, noise, t), t, encoded[part[:, 1].repeat(2)])
            errors = (output - model.schedule.target(x_0, noise, t)).square().flatten(1).mean(1)
            parts.append(errors.view(2, -1).mean(0).cpu())
        return torch.cat(parts)


def _pairs(rows: Tensor) -> Tensor:
    """int64 (b · m, 2): (sample, prompt) of a batch. rows: int64 (b, m), each sample's prompts."""
    return torch.stack([torch.arange(len(rows))[:, None].expand_as(rows), rows], 2).flatten(0, 1)


def some_of(samples: Samples) -> Samples:
    """At most `FITTED` of them, spread evenly."""
    return samples[np.unique(np.linspace(0, len(samples) - 1, FITTED).round().astype(int)) if len(samples) else []]


def scores_of(errors: Tensor) -> Tensor:
    """(n, prompts): of each prompt the smallest error of another one minus its own, relative to their mean.

    Args:
        errors: (n, prompts, timesteps); each timestep counts the same, however large its errors are.
    """
    return margins(-(errors / errors.mean(1, keepdim=True)).mean(2))


def best_timesteps(positives: Tensor, negatives: Tensor, labels: tuple[int, int]) -> tuple[float, ...]:
    """The timesteps of `FRACTIONS` whose scores separate two kinds of images best: one, or more where that is better.

    Args:
        positives, negatives: Errors (n, prompts, timesteps) of images of either kind.
        labels: The prompt whose score is to be high in the positives, and that whose score is to be low in the others.
    """

    def quality(chosen: Sequence[int]) -> tuple[float, float]:
        """AUC, and the distance of the means in units of their spread, which decides among equals."""
        sides = [
            scores_of(errors[:, :, list(chosen)])[:, label]
            for errors, label in zip((positives, negatives), labels, strict=True)
        ]
        apart = (sides[0].mean() - sides[1].mean()) / (sides[0].var() + sides[1].var() + 1e-12).sqrt()
        return auc(sides[0].numpy(), sides[1].numpy()), float(apart)

    chosen = [max(range(len(FRACTIONS)), key=lambda k: quality([k]))]
    while len(chosen) < MOST:
        more = max((k for k in range(len(FRACTIONS)) if k not in chosen), key=lambda k: quality([*chosen, k]))
        if quality([*chosen, more])[0] < quality(chosen)[0] + BETTER:
            break
        chosen.append(more)
    return tuple(FRACTIONS[k] for k in sorted(chosen))


def foil_of(i: int, prompts: Sequence[str]) -> str:
    """Another prompt than the i-th: the next one that differs, or the empty prompt where all are equal."""
    n = len(prompts)
    return next((prompts[(i + k) % n] for k in range(1, n) if prompts[(i + k) % n] != prompts[i]), "")


def load(inputs: DetectorInputs) -> SelfClassifier | None:
    """The original model as detector; None where there are only images."""
    return SelfClassifier(inputs.original, inputs.subjects) if inputs.original is not None else None
