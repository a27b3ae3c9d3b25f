"""The interface of a host, the program that the page runs in, and a stand-in for `salun ui`, which has none."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

from salun.errors import ConfigError
from salun.user_text import is_unicode

from .jobs import Job

ERASED = ("model", "model.safetensors")  # of a run, as `salun erase` names them


class Host(Protocol):
    """A program that keeps checkpoints and may use the GPU itself.

    Attributes:
        name: Shown on the page.
        data: The folder of jobs, runs and images.
        sets_up: Whether its jobs may run in an environment made by Set up.
    """

    name: str
    data: Path
    sets_up: bool

    def how_to_add(self) -> str:
        """What a user does so that another checkpoint is among `models`, as a sentence."""

    def models(self) -> dict[str, str]:
        """Title → what `salun --model` takes, in the order in which to show them."""

    def loaded(self) -> str | None:
        """The title of the model that is loaded now; None if it is not among `models`."""

    def skipped_checkpoints(self) -> int:
        """The number of its checkpoints that are not among `models`, which only has .safetensors files."""

    def checkpoints(self) -> Path | None:
        """Where new checkpoints go; None for the run's folder."""

    def loras(self) -> Path | None:
        """Where new LoRA files go; None for the run's folder."""

    def python(self) -> str:
        """The interpreter for child processes. Raises ConfigError if none has the packages."""

    def environment(self) -> dict[str, str]:
        """Additional environment variables of child processes."""

    def gpu_lease(self, job: Job) -> AbstractContextManager[object]:
        """Around a running job: the host's lock held, its models freed before and restored after."""

    def changed(self, job: Job) -> None:
        """Called when a job has ended; the host's lists are to show the files that it wrote."""

    def use(self, path: Path) -> str:
        """Use this checkpoint from now on. Returns a message. Raises ConfigError if that is impossible."""


class StandaloneHost:
    """The host of `salun ui`: models are the aliases, erased models and the checkpoints in folders.

    Files go into the run folders; checkpoints with a given name go into the data folder's `models`.
    """

    name = "salun ui"
    sets_up = False  # pip installs the packages

    def __init__(self, data: Path, models_dirs: Sequence[str] = ()) -> None:
        self.data, self._dirs = data.absolute(), list(models_dirs)
        with suppress(OSError):  # what cannot be written is said at the first job
            (self.data / "models").mkdir(parents=True, exist_ok=True)

    def how_to_add(self) -> str:
        place = f"put a .safetensors file (not a link) into {self.data / 'models'}"
        return f"To add one, {place}, or start salun ui with --models-dir FOLDER; then refresh the lists"

    def models(self) -> dict[str, str]:
        from salun.checkpoints.locate import FILES, aliases, checkpoint_folders

        models = {name: name for name in aliases()["models"]}
        models |= {title: place for title, place in self._made().items() if title not in models}
        for folder in checkpoint_folders(self._dirs):
            for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in FILES and p.is_file()):
                models.setdefault(path.relative_to(folder).as_posix(), str(path.absolute()))
        return {title: place for title, place in models.items() if is_unicode(title + place)}

    def _made(self) -> dict[str, str]:
        """Name → checkpoint: named ones, then erased models by the names of their runs, the latest first."""
        named = sorted(self.data.glob("models/*"))
        erased = [run / name for run in sorted(self.data.glob("runs/*"), reverse=True) for name in ERASED]
        home = self.data.resolve()
        checkpoints: dict[str, str] = {}
        for place in [*named, *erased]:
            model = (place / "model_index.json").is_file() or (place.suffix == ".safetensors" and place.is_file())
            if model and not place.name.startswith(".") and place.resolve().is_relative_to(home):
                checkpoints.setdefault(
                    place.parent.name if place.parent.parent.name == "runs" else place.name, str(place)
                )
        return checkpoints

    def loaded(self) -> str | None:
        return None

    def skipped_checkpoints(self) -> int:
        return 0

    def checkpoints(self) -> Path | None:
        return None

    def loras(self) -> Path | None:
        return None

    def python(self) -> str:
        return sys.executable

    def environment(self) -> dict[str, str]:
        return {}

    def gpu_lease(self, job: Job) -> AbstractContextManager[object]:
        return nullcontext()

    def changed(self, job: Job) -> None:
        return None

    def use(self, path: Path) -> str:
        raise ConfigError(f"there is no WebUI to load {os.path.basename(path)}; the file is {path}")
