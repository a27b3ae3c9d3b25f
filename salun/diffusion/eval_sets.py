"""The sets of prompts of an evaluation: which there are, their images, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from salun.diffusion.data.latents import decode_images, item_seed, sample_latents
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluation import EvalPrompts
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import Plan
from salun.diffusion.prompts.prompt_file import PromptRow, prompts_of_hub, read_prompts
from salun.diffusion.prompts.sets import PromptSet, prompt_sets
from salun.diffusion.prompts.vocabulary import Prompt
from salun.errors import ConfigError, DataError
from salun.evaluation.detector import Detection, Detector, Samples
from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metrics.image_drift import drift_of
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache

CONCEPT, OTHERS, ANCHOR = "concept", "other prompts", "anchor"  # the sets that every evaluation has


@dataclass(frozen=True, eq=False)
class SetSamples:
    """Images of a set of prompts.

    Args:
        parts: Those of each size.
        rows: Of each part, its rows in the set.
    """

    parts: Sequence[Samples]
    rows: Sequence[Sequence[int]]

    @classmethod
    def of(cls, samples: Samples) -> SetSamples:
        """A set whose images are all of one size."""
        return cls([samples], [range(len(samples))])

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def images(self) -> list[np.ndarray]:
        """uint8 (h, w, 3) each, in the order of the set."""
        return _in_order(self.rows, [list(part.images) for part in self.parts])

    @property
    def prompts(self) -> list[str]:
        """Of each image."""
        return _in_order(self.rows, [list(part.prompts) for part in self.parts])

    def detected(self, detector: Detector, progress: Progress = silent) -> Detection:
        """What a detector sees, in the order of the set; without features."""
        seen = [detector.detect(part, progress) for part in self.parts]
        if len(seen) == 1:
            return seen[0]
        order = np.argsort(np.concatenate([np.asarray(rows) for rows in self.rows]))
        valid = [each.valid for each in seen]
        known = None if any(each is None for each in valid) else np.concatenate([v for v in valid if v is not None])
        return Detection(
            {name: np.concatenate([each.scores[name] for each in seen])[order] for name in seen[0].scores},
            seen[0].threshold,
            known[order] if known is not None else None,
            adjustable=seen[0].adjustable,
        )


def _in_order(rows: Sequence[Sequence[int]], parts: Sequence[Sequence[Any]]) -> list[Any]:
    placed = {row: item for of, part in zip(rows, parts, strict=True) for row, item in zip(of, part, strict=True)}
    return [placed[i] for i in range(len(placed))]


@dataclass(frozen=True, eq=False)
class SetResult:
    """A set of prompts and what was found there.

    Args:
        seeds: Of its images.
        images: "before" and "after" → images of the original and of the model; one may be missing.
        seen: Detector → side → what it sees in them.
        measured: Metric of images → "before", "after" or "between" → value, as JSON.
    """

    prompts: PromptSet
    seeds: Sequence[int]
    images: Mapping[str, SetSamples]
    seen: Mapping[str, Mapping[str, Detection]]
    measured: Mapping[str, Any]

    @property
    def drift(self) -> Value:
        """How far its images moved."""
        if len(self.images) < 2:
            return Unknown("there is no original to compare with")
        before, after = self.images["before"], self.images["after"]
        if len(before.parts) > 1:
            return Unknown("the images are of several sizes")
        return drift_of(before.parts[0].latents, after.parts[0].latents)

    def rates(self, name: str, detector: Detector, plan: Plan, thresholds: Mapping[str, float]) -> dict[str, Any]:
        """Concept → side → in which part of the images a detector sees it, as JSON.

        Args:
            thresholds: Concept → score from which on it counts as detected.
        """
        rates: dict[str, Any] = {}
        for subject in plan.subjects:
            target = detector.target(subject)
            assert target is not None
            hits = {
                side: of.scores[target.attribute][:, target.label] >= thresholds.get(subject.name, of.threshold)
                for side, of in self.seen[name].items()
            }
            rates[subject.name] = {side: Estimate.percentage(shown).as_json() for side, shown in hits.items()}
        if self.prompts.preserve and detector.prompt_match is not None:
            match = {side: of.shows(detector.prompt_match, 0) for side, of in self.seen[name].items()}
            rates["as prompted"] = {side: Estimate.percentage(shown).as_json() for side, shown in match.items()}
        return rates


def wanted_sets(options: EvalOptions, plan: Plan, model: Model) -> tuple[list[PromptSet], list[str]]:
    """The sets that the options ask for, of n prompts at most, and notes for the user.

    Raises:
        ConfigError: A set does not exist, or has no prompts for a concept.
        DataError: A file of prompts cannot be used.
    """
    if options.sets and model.settings.vocabulary is not None:
        raise ConfigError(
            f"are prompts in free text, but {model.name} knows the words of its vocabulary only", option="sets"
        )
    made = prompt_sets(options.sets, plan.concepts, plan.prompts, options.synonyms, _similarity(model))
    for source in options.prompts:
        path = Path(source).expanduser()
        rows = read_prompts(path, skip_empty=True) if path.suffix or path.exists() else prompts_of_hub(source)
        _check_sizes(rows, model, path.name)
        made.append(PromptSet(path.name, rows))
    notes = []
    for i, each in enumerate(made):
        if len(each.rows) > options.n:
            notes.append(f"{each.name}: the first {options.n:,} of {len(each.rows):,} prompts (-n)")
            made[i] = replace(each, rows=each.rows[: options.n])
    return made, notes


def sets_of(prompts: EvalPrompts) -> dict[str, PromptSet]:
    """The held-out prompts of the concepts, others, and those of the anchors, as sets."""
    listed: dict[str, tuple[Sequence[Prompt], Sequence[int]]] = {
        CONCEPT: (prompts.forget, prompts.forget_seeds),
        OTHERS: (prompts.retain, prompts.retain_seeds),
        ANCHOR: prompts.anchors,
    }
    return {
        name: PromptSet(name, [PromptRow(p.text, s) for p, s in zip(*of, strict=True)], preserve=name == OTHERS)
        for name, of in listed.items()
    }


def _check_sizes(rows: Sequence[PromptRow], model: Model, where: str) -> None:
    """Raise DataError for a row of a size that the model cannot draw."""
    for row in rows:
        for side in (row.width, row.height):
            if side is not None and side % model.multiple:
                raise DataError(
                    f"{where}: row {row.row:,} asks for {side} pixels; {model.name} draws multiples of {model.multiple}"
                )


def _similarity(model: Model) -> Callable[[str, Sequence[str]], list[str]]:
    """A function of (phrase, nouns): the nouns, the nearest to the phrase first, by the model's own text encoder."""

    @torch.no_grad()
    def similar(phrase: str, nouns: Sequence[str]) -> list[str]:
        encoded = model.encode([phrase, *nouns]).hidden.float().mean(1)
        centered = F.normalize(encoded - encoded[1:].mean(0), dim=1)  # all encodings share a large common part
        order = (centered[1:] @ centered[0]).argsort(descending=True)
        return [nouns[int(i)] for i in order]

    return similar


def seeds_of(prompts: PromptSet, seed: int) -> list[int]:
    """Each row's own seed, or else one by its number."""
    return [item_seed(seed, "eval", i) if row.seed is None else row.seed for i, row in enumerate(prompts.rows)]


def sampled_set(
    model: Model,
    prompts: PromptSet,
    seeds: Sequence[int],
    progress: Progress = silent,
    stage: Stage = Stage.IMAGES_AFTER,
    cache: Cache | None = None,
    weights: str | None = None,
) -> SetSamples:
    """The set's images, each of its row's guidance and size, or else the model's own.

    Args:
        stage, cache, weights: As in `sample_latents`.
    """
    by_size: dict[tuple[int, int], dict[float, list[int]]] = {}
    usual = model.settings.sampling
    for i, row in enumerate(prompts.rows):
        size = (row.height or usual.resolution, row.width or usual.resolution)
        guidance = usual.guidance if row.guidance is None else row.guidance
        by_size.setdefault(size, {}).setdefault(guidance, []).append(i)
    parts, placed = [], []
    for size, by_guidance in by_size.items():
        latents = []
        rows = [i for of in by_guidance.values() for i in of]
        for guidance, of in by_guidance.items():
            texts, theirs = [prompts.rows[i].text for i in of], [seeds[i] for i in of]
            with model.sampling_as(replace(usual, guidance=guidance), size):
                latents.append(sample_latents(model, texts, theirs, progress, stage, cache, weights).cpu())
        joined = torch.cat(latents)
        with model.sampling_as(usual, size):
            images = decode_images(model, joined)
        texts = [prompts.rows[i].text for i in rows]
        parts.append(Samples(images, joined, texts, compare_prompts=prompts.preserve))
        placed.append(rows)
    return SetSamples(parts, placed)
