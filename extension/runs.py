"""The runs of a host. Their folders are untrusted input: whatever cannot be read is reported as such."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, DataError
from salun.runs.folder import new_run_folder
from salun.runs.reading import read_run

from .host import Host
from .limits import MAX_ENTRIES, truncated
from .markup import loss_chart
from .messages import label, render
from .paths import confined, confined_file, displayable, displayed, without_folders

DELTA = "delta.salun.safetensors"
DOWNLOADABLE_FILES = {  # files of a run that the API serves, and their types
    "report.html": "text/html; charset=utf-8",
    "before_after.png": "image/png",
    "run.json": "application/json",
    "log.txt": "text/plain; charset=utf-8",
    "mask.safetensors": "application/octet-stream",
    DELTA: "application/octet-stream",
}
UNREADABLE: dict[str, Any] = {
    "status": "unreadable", "concept": None, "model": "", "error": None, "banner": None, "headline": [], "figures": [],
    "files": [],
}  # fmt: skip
DERIVED = (".salun.safetensors", ".lora.safetensors", ".diff.safetensors")  # endings of files that are not checkpoints


class Runs:
    """The run folders of a host. folder: where they are."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = host.data / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Path:
        """A run's folder. Raises ConfigError for a name that no run has."""
        place = confined(name, self.folder)
        if "/" in name or not (place / "run.json").is_file():
            raise ConfigError(f"there is no run {name[:80]!r}", code="not-found")
        return place

    def has(self, name: str) -> bool:
        """Whether there is a run of this name."""
        try:
            self.get(name)
        except ConfigError:
            return False
        return True

    def new(self, name: str, taken: set[str | None]) -> Path:
        """A new run folder. taken: names of runs that queued jobs will create."""
        folder = new_run_folder(name, self.folder)
        n, stem = 1, folder.name
        while folder.name in taken or folder.exists():
            n += 1
            folder = self.folder / f"{stem}-{n}"
        return folder

    def options(self, name: str) -> dict[str, Any]:
        """The options in a run's record, which may be untrusted input. Raises ConfigError for an unreadable one."""
        try:
            options: dict[str, Any] = read_run(self.get(name))["options"]
        except DataError as error:
            raise ConfigError(error.message, advice=error.advice, code=error.code) from error
        return options

    def losses(self, name: str) -> str:
        """The chart of a run's losses as SVG; empty where there is none."""
        return loss_chart(read_run(self.get(name))["losses"])

    def file(self, run: str, name: str) -> tuple[Path, str]:
        """A file of a run that may be served, and its type."""
        if name not in DOWNLOADABLE_FILES:
            raise ConfigError(f"name is {name[:80]!r}, but must be one of {', '.join(DOWNLOADABLE_FILES)}")
        return confined_file(name, self.get(run)), DOWNLOADABLE_FILES[name]

    def delta(self, run: str) -> Path:
        """The delta's file of a run."""
        return confined_file(DELTA, self.get(run))

    def deltas(self) -> list[str]:
        """Names of runs that have a delta, the latest first."""
        return sorted(filter(displayable, (p.parent.name for p in self.folder.glob(f"*/{DELTA}"))), reverse=True)

    def checkpoint(self, run: str) -> Path:
        """The erased checkpoint that a run wrote. Raises ConfigError if it wrote none, or it is gone."""
        folder = self.get(run)
        homes = [home.resolve() for home in (folder, self.checkpoint_home())]
        for path in [*self.options(run).get("output", []), folder / "model.safetensors", folder / "model"]:
            place = Path(os.path.realpath(path))  # run.json is untrusted input: it may name only what is in our folders
            within = any(home in place.parents for home in homes)
            if within and not place.name.endswith(DERIVED) and os.path.exists(place):
                return place
        raise ConfigError(f"the erased model of {run} no longer exists")

    def checkpoint_home(self) -> Path:
        """The folder of new checkpoints with a given name."""
        return self.host.checkpoints() or self.host.data / "models"

    def summaries(self, open_runs: set[str | None]) -> list[dict[str, Any]]:
        """All runs' summaries, the latest first. An unreadable run has the status "unreadable" and an error.

        open_runs: names of runs with an open job; other runs that are "running" by their record have stopped.
        """
        names = [file.parent.name for file in self.folder.glob("*/run.json")]
        return [self._summary(name, open_runs) for name in sorted(names, reverse=True)]

    def _summary(self, name: str, open_runs: set[str | None]) -> dict[str, Any]:
        try:
            if not displayable(name):
                raise ConfigError("the name of its folder is not UTF-8", advice="Rename the folder")
            record = read_run(confined(name, self.folder))
        except (ConfigError, DataError) as error:
            return {"run": displayed(name), **UNREADABLE, "error": self.without_paths(render(error))}
        entry = summary(record, self.folder / name)
        if record["status"] == "running" and name not in open_runs:
            entry["status"] = "stopped"
        if entry["error"]:
            entry["error"] = self.without_paths(str(entry["error"]), record["options"].get("model"))
        return {"run": name, **entry}

    def without_paths(self, text: str, model: Any = None) -> str:
        """A text without absolute paths of this machine: paths in the host's folders are made relative.

        model: a model that the text may name, in any folder.
        """
        folders = {self.host.data, self.host.checkpoints(), self.host.loras()}
        if isinstance(model, str) and Path(model).is_absolute():
            folders.add(Path(model).parent)
        return without_folders(text, [folder for folder in folders if folder is not None])


def summary(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A run's entry in a list, from its record."""
    from salun.report.metrics import banner, headline, lines_of, metric_rows

    concepts = record["options"].get("concept")
    entry: dict[str, Any] = {
        **UNREADABLE,
        "status": record["status"],
        "concept": [truncated(text) for text in concepts][:MAX_ENTRIES] if concepts is not None else None,
        "model": truncated((record["options"].get("model") or "").replace("\\", "/").split("/")[-1]),
        "error": truncated(record["error"]) if record["error"] else None,
        "files": [name for name in DOWNLOADABLE_FILES if (folder / name).is_file()],
    }
    try:
        if record["status"] == "done":
            rows = metric_rows(record["metrics"])[:MAX_ENTRIES]
            shown = banner(record["metrics"], label)
            lines = lines_of(shown) + headline(record["concepts"], record["metrics"])
            entry["banner"] = {part: truncated(text) for part, text in dataclasses.asdict(shown).items()}
            entry["headline"] = [truncated(line) for line in lines[:MAX_ENTRIES]]
            entry["figures"] = [[truncated(str(cell)) for cell in row] for row in rows]
    except Exception:  # metrics may be untrusted input: the other runs are listed all the same
        entry["error"] = "its run.json is from another version of salun"
    return entry
