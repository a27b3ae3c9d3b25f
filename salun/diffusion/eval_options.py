"""The options of `salun eval`."""

from __future__ import annotations

from dataclasses import dataclass

from salun.detectors import DETECTORS
from salun.diffusion.options import SAMPLERS, ModelOptions
from salun.image_metrics import IMAGE_METRICS
from salun.options import option

SETS = ("synonyms", "compositions", "languages", "neighbors")


@dataclass(frozen=True)
class ComparedOptions(ModelOptions):
    """Which model to look at, for which concept, and how its images are sampled."""

    against: str | None = option(
        None, "Original model, unless a run folder is evaluated; without it there are rates, but no verdict", path=True
    )
    concept: list[str] = option([], "Concept that the model should have forgotten; repeatable")
    anchor: list[str] = option([], "Anchor of each concept, in order", auto="the preset's")
    clip: str | None = option(
        None,
        "CLIP model of detectors and metrics by CLIP that name none, hub id (or ID@REVISION) or folder",
        auto="openai's ViT-L/14",
        path=True,
    )
    seed: int = option(1, "Random seed", minimum=0, maximum=2**63 - 1)
    show_sensitive: bool = option(False, "Do not blur images of sensitive concepts in the report")
    sampling_steps: int | None = option(None, "Sampler steps", auto="the model's", minimum=1, maximum=1000)
    sampling_guidance: float | None = option(None, "Guidance scale", auto="the model's", minimum=0, maximum=100)
    sampler: str | None = option(None, "Sampler", auto="the model's DPM-Solver, else dpm++2m", choices=SAMPLERS)
    resolution: int | None = option(None, "Side length in pixels", auto="the model's", minimum=8, maximum=4096)
    negative_prompt: str | None = option(None, "Negative prompt", auto="the empty prompt")
    clip_skip: int | None = option(
        None, "CLIP skip, counted from the last layer", auto="the model's", minimum=1, maximum=12
    )


@dataclass(frozen=True)
class EvalOptions(ComparedOptions):
    """How to evaluate a model against its original."""

    detector: list[str] = option(
        [],
        f"Detector ({', '.join(DETECTORS)}), with an argument after a colon where it takes one; repeatable",
        auto="the run's; else the classifier in the model's folder, else self: the original model as classifier",
    )
    metric: list[str] = option(
        [],
        f"Further metric of the images ({', '.join(IMAGE_METRICS)}); fid, kid and cmmd take a folder of real images "
        "after a colon; repeatable",
    )
    prompts: list[str] = option(
        [],
        "File of prompts (.csv with the columns of I2P or COCO, or .txt), or hub id of a data set of them, with a "
        "revision or a split as in ID@REVISION:SPLIT; repeatable",
        path=True,
    )
    max_prompts: int | None = option(
        None, "Prompts of each file or data set, from its beginning", auto="all", minimum=1, maximum=1_000_000
    )
    sets: list[str] = option(
        [], f"Additional set of prompts made from the concept ({', '.join(SETS)}); repeatable, for models of free text"
    )
    synonyms: list[str] = option([], "Other phrase for the concept; adds the set synonyms; repeatable")
    neighbors: list[str] = option(
        [], "What is near the concept and must stay, such as a similar object; adds the set neighbors; repeatable"
    )
    n: int = option(
        100,
        "Images of each model on held-out prompts of each concept, on others and on the anchor's",
        minimum=2,
        maximum=1_000_000,
    )
    keep_images: bool = option(False, "Write every image")


GROUPS = {
    "What": ("concept", "anchor", "against", "detector", "metric", "clip", "n"),
    "Further prompts": ("prompts", "max_prompts", "sets", "synonyms", "neighbors"),
    "Model": ("components", "models_dir", "prediction_type", "clip_skip", "resolution", "allow_pickle"),
    "Sampling": ("sampling_steps", "sampling_guidance", "sampler", "negative_prompt", "seed"),
    "Output": ("keep_images", "show_sensitive"),
    "Computing": ("device", "dtype"),
}
NAMES = {"eval_images": "n"}  # options of an erasure that an evaluation has by another name


def option_name(name: str) -> str:
    """The name of an option as an evaluation has it: advice is written for erasures."""
    return NAMES.get(name, name)
