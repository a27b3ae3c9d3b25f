"""The available models, by title."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun.diffusion.options import EraseJob
from salun.errors import ConfigError, SalunError, literal

from .host import Host
from .paths import displayable, safe_name
from .runs import Runs

if TYPE_CHECKING:
    from salun.diffusion.model.settings import ModelSettings


class Models:
    """The models of a host, and the erased models of its runs."""

    def __init__(self, host: Host, runs: Runs) -> None:
        self.host, self.runs = host, runs

    def all(self) -> dict[str, str]:
        """Title → alias, path or hub id."""
        return {title: place for title, place in self.host.models().items() if displayable(title)}

    def first(self) -> str | None:
        """The initial choice of a list: the model that the host has loaded, else the first."""
        return self.host.loaded() or next(iter(self.all()), None)

    def concepts(self, title: str | None) -> dict[str, str]:
        """Concept → anchor: of the model's vocabulary if it has one, else of the presets."""
        from salun.diffusion.prompts.concepts import presets

        settings = self.settings(title)
        if settings is not None and settings.vocabulary is not None:
            vocabulary = settings.vocabulary
            values = [value for group in vocabulary.attributes.values() for value in group]
            return {value: vocabulary.anchors.get(value, "") for value in values}
        return {name: str(entry["anchors"][0]) for name, entry in presets().items()}

    def settings(self, title: str | None) -> ModelSettings | None:
        """What the files of a model on this machine say of it, without its weights; None where they cannot be read.

        Of an alias of a hub model, what the table of aliases says.
        """
        from salun.checkpoints.locate import ASSETS, aliases
        from salun.diffusion.model.loading import describe
        from salun.diffusion.model.settings import read_settings

        if title is None and self.host.checkpoints() is None:
            title = str(aliases()["default"])
        entry = aliases()["models"].get(title, {})
        try:
            if "repo" in entry:
                return read_settings(None, entry["family"], entry)
            place = str(ASSETS / entry["path"]) if "path" in entry else self.named(title)
            return describe(place).settings if os.path.exists(place) else None
        except (SalunError, OSError, ImportError):  # the job will say what is wrong with it
            return None

    def automatic(self, title: str | None) -> dict[str, Any]:
        """Option → the number that it gets for a model where it is not set, of those that no goal decides."""
        from salun.diffusion.model.settings import SAMPLING
        from salun.diffusion.plan import BY_GOAL

        settings = self.settings(title)
        if settings is None:
            return {}
        sampling = {option: getattr(settings.sampling, field) for option, field in SAMPLING.items()}
        recipe = {name: value for name, value in vars(settings.recipe).items() if name not in BY_GOAL}
        return {name: value for name, value in (sampling | recipe).items() if value not in (None, "")}

    def check(self, title: str | None, job: EraseJob) -> None:
        """Raises ConfigError for concepts, anchors and options that a model does not take, as far as is known."""
        from salun.diffusion.plan import make_plan
        from salun.diffusion.prompts.concepts import Concept

        settings = self.settings(title)
        if settings is not None:
            make_plan(settings, stem_of(title), [Concept(name) for name in job.concept], job.options)

    def named(self, title: Any) -> str:
        """The alias, path or hub id of a title, or a run's erased model. Raises ConfigError for any other value."""
        if not isinstance(title, str):  # JSON holds lists and objects as well
            raise ConfigError(f"is {repr(title)[:80]}, but must be a text", option="model")
        models = self.all()
        if title in models:
            return models[title]
        if not any(c in title for c in "/\\:") and not title.startswith("."):
            try:
                return str(self.runs.checkpoint(title))
            except ConfigError:
                pass
        raise ConfigError(f"there is no model {title[:80]!r}", advice=literal(self.host.how_to_add()), code="no-model")

    def source(self, title: Any) -> str | None:
        """As `named`. No title gives None, the bundled model; it is an error on a host with checkpoints, where the
        result would be stored among these.
        """
        if title is None and self.host.checkpoints() is not None:
            empty = f"{self.host.name} has no .safetensors checkpoint yet. {self.host.how_to_add()}"
            raise ConfigError("no checkpoint is chosen", advice="Choose one" if self.all() else literal(empty))
        return self.named(title) if title is not None else None

    def base_of(self, run: str, otherwise: str) -> str:
        """The model of a run, if it is an available model or another run's; else the model `otherwise`."""
        from salun.checkpoints.locate import aliases

        model = self.runs.options(run).get("model") or aliases()["default"]
        if isinstance(model, str):
            if model in self.all().values():
                return model
            real = Path(os.path.realpath(model))
            for place in real.parents:
                if place.parent == self.runs.folder.resolve() and self.runs.checkpoint(place.name) == real:
                    return model
        if otherwise:
            return self.named(otherwise)
        raise ConfigError(
            f"the base of {run} is no longer among the checkpoints",
            advice="Under Deltas, choose it as Checkpoint and the run as Delta 1, and save it there",
        )


def stem_of(title: Any) -> str:
    """The stem of a file name, made of a model's title."""
    last = str(title or "shapes").split("/")[-1]
    return safe_name(re.sub(r"\.(safetensors|ckpt)|(?<!\s)\s*\[[0-9a-f]+\]$", "", last), "model")
