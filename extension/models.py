"""The available models, by title."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from salun.errors import ConfigError

from .host import Host
from .paths import displayable, safe_name
from .runs import Runs


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
        from salun.checkpoints.locate import ASSETS, aliases
        from salun.diffusion.model.loading import describe
        from salun.diffusion.prompts.concepts import presets

        # only embedded models are read: others may be large, or on the hub
        default = aliases()["default"] if self.host.checkpoints() is None else None
        entry = aliases()["models"].get(title or default, {})
        if "path" in entry and (ASSETS / entry["path"]).is_dir():
            vocabulary = describe(str(ASSETS / entry["path"])).settings.vocabulary
            if vocabulary is not None:
                values = [value for group in vocabulary.attributes.values() for value in group]
                return {value: vocabulary.anchors.get(value, "") for value in values}
        return {name: str(entry["anchors"][0]) for name, entry in presets().items()}

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
        raise ConfigError(f"there is no model {title[:80]!r}", code="not-found")

    def source(self, title: Any) -> str | None:
        """As `named`. No title gives None, the embedded model; it is an error on a host with checkpoints, where the
        result would be stored among these.
        """
        if title is None and self.host.checkpoints() is not None:
            listed = "Choose one" if self.all() else f"{self.host.name} has no .safetensors checkpoint yet"
            raise ConfigError("no checkpoint is chosen", advice=listed)
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
