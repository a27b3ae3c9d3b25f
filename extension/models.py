"""The models that can be chosen, by title."""

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
    """The models of a host, and those that its runs erased."""

    def __init__(self, host: Host, runs: Runs) -> None:
        self.host, self.runs = host, runs

    def all(self) -> dict[str, str]:
        """Title → what salun takes for it."""
        return {title: place for title, place in self.host.models().items() if displayable(title)}

    def first(self) -> str | None:
        """What a list shows before anything is chosen: what the host generates with, else the first."""
        return self.host.loaded() or next(iter(self.all()), None)

    def concepts(self, title: str | None) -> dict[str, str]:
        """Word → its anchor: of the model's own vocabulary where it has one, else the presets."""
        from salun.checkpoints.locate import ASSETS, aliases
        from salun.diffusion.model.loading import describe
        from salun.diffusion.prompts.concepts import presets

        # only embedded models are looked into here: others may be large, or on the hub
        default = aliases()["default"] if self.host.checkpoints() is None else None
        entry = aliases()["models"].get(title or default, {})
        if "path" in entry and (ASSETS / entry["path"]).is_dir():
            vocabulary = describe(str(ASSETS / entry["path"])).settings.vocabulary
            if vocabulary is not None:
                values = [value for group in vocabulary.attributes.values() for value in group]
                return {value: vocabulary.anchors.get(value, "") for value in values}
        return {name: str(entry["anchors"][0]) for name, entry in presets().items()}

    def named(self, title: Any) -> str:
        """What salun takes for a title, or for a run's erased model. Raises ConfigError for any other value."""
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
        """The same; None for no title, where that means the embedded model: never on a host with checkpoints, as the
        result would be put among them.
        """
        if title is None and self.host.checkpoints() is not None:
            listed = "Choose one" if self.all() else f"{self.host.name} lists none yet that ends in .safetensors"
            raise ConfigError("no checkpoint is chosen", advice=listed)
        return self.named(title) if title is not None else None

    def base_of(self, run: str, otherwise: str) -> str:
        """What a run was made with, if it is one of the models or another run's; else the model `otherwise`."""
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
            f"the base of {run} is not among the checkpoints any more",
            advice="Under Deltas, choose it as Checkpoint and the run as Delta 1, and save it there",
        )


def stem_of(title: Any) -> str:
    """A file name's stem made of a model's title."""
    last = str(title or "shapes").split("/")[-1]
    return safe_name(re.sub(r"\.(safetensors|ckpt)|(?<!\s)\s*\[[0-9a-f]+\]$", "", last), "model")
