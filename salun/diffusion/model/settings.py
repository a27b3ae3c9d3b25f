"""How a model is sampled and trained: numbers from its own salun.yaml, the alias table and its family."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salun.checkpoints.locate import SETTINGS, aliases
from salun.diffusion.model.few_steps import FewSteps
from salun.diffusion.options import EraseOptions, Recipe, Sampling
from salun.diffusion.prompts.vocabulary import Vocabulary
from salun.errors import ConfigError, ModelError
from salun.options import from_mapping
from salun.untrusted import read_yaml

SAMPLING = {  # option → field of Sampling
    "sampling_steps": "steps",
    "sampling_guidance": "guidance",
    "sampler": "sampler",
    "resolution": "resolution",
    "negative_prompt": "negative_prompt",
}


@dataclass(frozen=True)
class ModelSettings:
    """What is known of a model beyond its weights, from the `salun.yaml` in its folder or from its family.

    recipe: the numbers behind `auto`. paper_recipes: the authors', by kind of concept; empty where they ran nothing
    alike. detector: folder of the classifier of its images. few_steps: a sign that it is meant for few steps. labels:
    whether it takes class labels, which are its vocabulary, instead of text.
    """

    sampling: Sampling
    recipe: Recipe
    paper_recipes: dict[str, Recipe]
    vocabulary: Vocabulary | None
    detector: Path | None
    few_steps: FewSteps | None = None
    labels: bool = False


def display_name(name: str) -> str:
    """A model's name for files that are shared: of a path on this machine only the last part."""
    return Path(name).name if Path(name).expanduser().exists() else name


def settings_for(settings: ModelSettings, options: EraseOptions, name: str, multiple: int) -> ModelSettings:
    """The settings with the sampling options applied. Raises ConfigError unless `multiple` divides the resolution."""
    if options.resolution is not None and options.resolution % multiple:
        raise ConfigError(
            f"is {options.resolution}, but must be a multiple of {multiple} for {name}", option="resolution"
        )
    return replace(settings, sampling=sampling_with(settings.sampling, options))


def sampling_with(sampling: Sampling, options: EraseOptions) -> Sampling:
    """A model's sampling settings, overridden by the options that are set."""
    given = {field: getattr(options, name) for name, field in SAMPLING.items()}
    return replace(sampling, **{field: value for field, value in given.items() if value is not None})


SECTIONS = ("sampling", "recipe", "recipes_paper", "vocabulary")


def read_settings(
    folder: Path | None, family: str, entry: Mapping[str, Any], resolution: int | None = None
) -> ModelSettings:
    """Settings of a model: `salun.yaml` in its folder over the alias entry over the native one over the family."""
    path = (folder or Path()) / SETTINGS
    in_folder = _settings_in_folder(path) if folder is not None and os.path.lexists(path) else {}
    shared = aliases()["families"].get(entry.get("family", family), {})

    native = {"sampling": {"resolution": resolution}} if resolution else {}

    def merged(key: str) -> dict[str, Any]:
        return {**shared.get(key, {}), **native.get(key, {}), **entry.get(key, {}), **in_folder.get(key, {})}

    # a model with its own recipe is not a model that the authors ran
    papers = in_folder.get("recipes_paper", {} if "recipe" in in_folder else shared.get("recipes_paper", {}))
    detector = in_folder.get("detector")
    if folder is not None and detector is not None and not _is_inside(folder, detector):
        raise ModelError(f"{path}: detector must be a folder inside the model's folder")
    return ModelSettings(
        sampling=from_mapping(Sampling, merged("sampling"), str(path)),
        recipe=from_mapping(Recipe, merged("recipe"), str(path)),
        paper_recipes={
            kind: from_mapping(Recipe, {**merged("recipe"), **paper}, str(path)) for kind, paper in papers.items()
        },
        vocabulary=Vocabulary.from_mapping(in_folder["vocabulary"], str(path)) if "vocabulary" in in_folder else None,
        detector=folder / detector if folder is not None and detector else None,
    )


def _settings_in_folder(path: Path) -> dict[str, Any]:
    """What a model's `salun.yaml` holds. Raises ModelError."""
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    sections = [content, *(content.get(key, {}) for key in SECTIONS)] if isinstance(content, dict) else [content]
    if all(isinstance(section, dict) for section in sections):
        sections += content.get("recipes_paper", {}).values()
    if not all(isinstance(section, dict) for section in sections):
        raise ModelError(f"{path} cannot be read: expected a mapping of names to values, as in that of `shapes`")
    return dict(content)


def _is_inside(folder: Path, name: Any) -> bool:
    """Whether a text names a place below a folder, links followed."""
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute():
        return False
    home = os.path.realpath(folder)
    return Path(os.path.realpath(folder / name)).is_relative_to(home)
