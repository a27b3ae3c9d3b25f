"""The sets of prompts of an evaluation: which there are, their images, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salun.diffusion.data.latents import item_seed, lazy_images, sample_latents
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluation import EvalPrompts
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.options import Sampling
from salun.diffusion.plan import Plan
from salun.diffusion.prompts.prompt_file import PromptRow, prompts_of_hub, read_prompts
from salun.diffusion.prompts.sets import PromptSet, prompt_sets
from salun.diffusion.prompts.vocabulary import Prompt
from salun.errors import ConfigError, DataError
from salun.evaluation.calibration import Calibration
from salun.evaluation.detector import Detection, Detector, Samples
from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.further_sets import ANCHOR, CONCEPT, OTHERS
from salun.evaluation.lazy_images import LazyImages, picked
from salun.evaluation.metrics.image_drift import drift_of
from salun.progress import Progress, Stage, in_parts, silent
from salun.runs.cache import Cache
from salun.runs.record import RunRecord

ENCODED = 512  # prompts; a multiple of every batch size, so that batches in the cache are the same for any list


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
    def images(self) -> LazyImages:
        """uint8 (h, w, 3) each, in the order of the set; decoded when they are read."""
        return picked(_in_order(self.rows, [[(part.images, i) for i in range(len(part))] for part in self.parts]))

    @property
    def prompts(self) -> list[str]:
        """Of each image."""
        return _in_order(self.rows, [list(part.prompts) for part in self.parts])

    def detected(self, detector: Detector, progress: Progress = silent) -> Detection:
        """What a detector sees, in the order of the set; without features."""
        counted = in_parts(progress, [len(part) for part in self.parts])
        seen = [detector.detect(part, of_part) for part, of_part in zip(self.parts, counted, strict=True)]
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
    def texts(self) -> np.ndarray:
        """The prompt of each image, (n,)."""
        return np.array([row.text for row in self.prompts.rows])

    @property
    def drift(self) -> Value:
        """How far its images moved."""
        if len(self.images) < 2:
            return Unknown("there is no original to compare with")
        before, after = self.images["before"], self.images["after"]
        if len(before.parts) > 1:
            return Unknown("the images are of several sizes")
        return drift_of(before.parts[0].latents, after.parts[0].latents)

    def rates(
        self, name: str, detector: Detector, plan: Plan, calibrations: Mapping[str, Calibration]
    ) -> dict[str, Any]:
        """Concept → in what percentage of each side's images a detector sees it, as `rate_json`.

        Args:
            calibrations: Concept → the detector's calibration on the original; empty where there is no original.
        """
        rates: dict[str, Any] = {}
        for subject in plan.subjects:
            target, calibration = detector.target(subject), calibrations.get(subject.name)
            assert target is not None
            hits = {
                side: of.scores[target.attribute][:, target.label] >= (calibration or of).threshold
                for side, of in self.seen[name].items()
            }
            rates[subject.name] = rate_json(hits, calibration, self.texts)
        if self.prompts.preserve and detector.prompt_match is not None:
            match = {side: of.shows(detector.prompt_match, 0) for side, of in self.seen[name].items()}
            rates["as prompted"] = rate_json(match, None, self.texts)
        return rates


def rate_json(
    hits: Mapping[str, np.ndarray], calibration: Calibration | None, prompts: np.ndarray | None = None
) -> dict[str, Any]:
    """Side → percentage of True, raw and, where a calibration says what a detector's word is worth, corrected.

    Where it says that the detector cannot tell, both are unknown for its `reason`. A corrected one is cut off at 0 and
    100 %.

    Args:
        hits: Side → bool (n,), n > 0.
        calibration: None where there is none: the percentage is raw.
        prompts: (n,), whose images depend on each other; None where all are independent.
    """
    reason = calibration.reason if calibration is not None else None
    raw = {side: Estimate.percentage(h, prompts).as_json() if reason is None else None for side, h in hits.items()}
    corrected = None
    if calibration is not None:
        corrected = {side: _cut_off(calibration.corrected_rate(h, prompts)).as_json() for side, h in hits.items()}
    return {**raw, "calibrated": calibration is not None, "corrected": corrected, "reason": reason}


def _cut_off(value: Value) -> Value:
    """A percentage within 0 and 100, and its interval."""
    if isinstance(value, Unknown):
        return value
    ends = (None if end is None else min(max(end, 0.0), 100.0) for end in (value.low, value.high))
    return Estimate(min(max(value.value, 0.0), 100.0), value.n, *ends)


def wanted_sets(options: EvalOptions, plan: Plan, model: DiffusionModel, record: RunRecord) -> list[PromptSet]:
    """The sets that the options ask for besides the held-out prompts, each in full unless the options bound it.

    Args:
        record: Gets the files as inputs, and what the user should know of them as notes.

    Raises:
        ConfigError: A set does not exist, has no prompts for a concept, or has the name of another.
        DataError: A file of prompts cannot be used.
    """
    phrases = {name: given for name in ("synonyms", "neighbors") if (given := getattr(options, name))}
    names = list(dict.fromkeys([*options.sets, *phrases]))
    if names and model.settings.vocabulary is not None:
        raise ConfigError(
            f"are prompts in free text, but {model.name} knows the words of its vocabulary only",
            option="sets" if options.sets else names[0],
        )
    made = prompt_sets(names, plan.concepts, plan.prompts, phrases, _similarity(model))
    made += [_listed(source, options.max_prompts, model, record) for source in options.prompts]
    _check_names([CONCEPT, OTHERS, ANCHOR, *(each.name for each in made)])
    return made


def folder_name(name: str) -> str:
    """The name of a set as that of the folder of its images."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for sets whose results would have the same name, on file systems that ignore case too."""
    by_folder: dict[str, str] = {}
    for name in names:
        folder = folder_name(name).casefold()
        if folder in by_folder:
            raise ConfigError(
                f"name the sets {by_folder[folder]!r} and {name!r}, whose results would replace each other",
                option="prompts",
                advice="Rename a file, or evaluate it apart, with another {output}",
            )
        by_folder[folder] = name


def _listed(source: str, most: int | None, model: DiffusionModel, record: RunRecord) -> PromptSet:
    """The prompts of a file, or of a data set of the hub as ID or ID@REVISION; at most the first `most`."""
    path, (repo, _, revision) = Path(source).expanduser(), source.partition("@")
    if path.exists() or Path(repo).suffix:
        name, listed = path.name, read_prompts(path)
        record.add_input("prompts", path, name)
    else:
        name, listed = repo, prompts_of_hub(repo, revision or None)
        record.inputs.append({"kind": "prompts", "path": repo, "revision": listed.revision or "unknown"})
    rows = listed.rows[:most]
    _check_rows(rows, model, name)
    if listed.empty:
        record.notes.append(f"{name}: skipped rows with an empty prompt: {listed.empty:,}")
    if len(rows) < len(listed.rows):
        record.notes.append(f"{name}: the first {len(rows):,} of {len(listed.rows):,} prompts (max_prompts)")
    return PromptSet(name, rows)


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


def _check_rows(rows: Sequence[PromptRow], model: DiffusionModel, where: str) -> None:
    """Raise DataError for a row that the model cannot draw: its size, or the length of its prompt."""
    for row in rows:
        model.chunks(row.text)
        for side in (row.width, row.height):
            if side is not None and side % model.multiple:
                raise DataError(
                    f"{where}: row {row.row:,} asks for {side} pixels; {model.name} draws multiples of {model.multiple}"
                )


def _similarity(model: DiffusionModel) -> Callable[[str, Sequence[str]], list[str]]:
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


def sampled_as(row: PromptRow, usual: Sampling) -> tuple[float, tuple[int, int]]:
    """Guidance, and height and width in pixels, of a row's image: its own, or else the model's usual ones."""
    guidance = usual.guidance if row.guidance is None else row.guidance
    return guidance, (row.height or usual.resolution, row.width or usual.resolution)


def sampled_set(
    model: DiffusionModel,
    prompts: PromptSet,
    seeds: Sequence[int],
    progress: Progress = silent,
    stage: Stage = Stage.IMAGES_AFTER,
    cache: Cache | None = None,
    weights: str | None = None,
) -> SetSamples:
    """The set's images, each of its row's guidance and size, or else the model's own.

    Its latents are held; images are decoded when they are read (`lazy_images`).

    Args:
        stage, cache, weights: As in `sample_latents`.
    """
    by_size: dict[tuple[int, int], dict[float, list[int]]] = {}
    usual = model.settings.sampling
    for i, row in enumerate(prompts.rows):
        guidance, size = sampled_as(row, usual)
        by_size.setdefault(size, {}).setdefault(guidance, []).append(i)
    parts, placed = [], []
    counted = in_parts(progress, [len(of) for by_guidance in by_size.values() for of in by_guidance.values()])
    for size, by_guidance in by_size.items():
        latents = []
        rows = [i for of in by_guidance.values() for i in of]
        for guidance, of in by_guidance.items():
            texts, theirs = [prompts.rows[i].text for i in of], [seeds[i] for i in of]
            with model.sampling_as(replace(usual, guidance=guidance), size):
                latents.append(_sampled(model, texts, theirs, next(counted), stage, cache, weights))
        ordered = torch.cat(latents)[np.argsort(rows)]  # so that those who read the set decode each batch once
        rows.sort()
        with model.sampling_as(usual, size):
            images = lazy_images(model, ordered)
        texts = [prompts.rows[i].text for i in rows]
        parts.append(Samples(images, ordered, texts, compare_prompts=prompts.preserve))
        placed.append(rows)
    return SetSamples(parts, placed)


def _sampled(
    model: DiffusionModel,
    texts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress,
    stage: Stage,
    cache: Cache | None,
    weights: str | None,
) -> Tensor:
    """As `sample_latents`, on the CPU, with the encodings of `ENCODED` prompts at once: a list may have 30,000."""
    chunks = [slice(start, start + ENCODED) for start in range(0, len(texts), ENCODED)]
    done: list[Tensor] = []
    for chunk, part in zip(chunks, in_parts(progress, [len(texts[chunk]) for chunk in chunks]), strict=True):
        done += sample_latents(model, texts[chunk], seeds[chunk], part, stage, cache, weights).cpu()
    return torch.stack(done)
