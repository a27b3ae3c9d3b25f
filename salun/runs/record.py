"""The record of a run: `run.json`, written atomically from the start on, timings, peak memory, files with hashes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from salun.compute.environment import PACKAGES, peak_memory, versions
from salun.errors import Cancelled, ConfigError, ModelError
from salun.files import remove_leftovers, sha256_file, write_bytes
from salun.progress import Stage
from salun.runs.folder import FILES, STATE, check_folder, check_links, exclusive_lock
from salun.runs.reading import SCHEMA, blank_record

NOT_IN_FINGERPRINT = (  # options on which no output's bytes depend
    "output", "run_dir", "models_dir", "allow_pickle", "show_sensitive", "save_every", "workers", "as_given",
)  # fmt: skip
INPUTS = (  # options that are paths of inputs; where `facts` have one's name, its content is identified by that
    "model", "components", "mask", "forget_images", "retain_images", "data", "original", "forget",
)  # fmt: skip
logger = logging.getLogger("salun")


class RunRecord:
    """The record of a run: one attribute for each part of `run.json`, written to the folder if there is one.

    Args:
        folder: The run folder; None for a run without files, as on all processes but the first.
        facts: What the run's result depends on besides its options and the versions. A fact with the name of one of
            `INPUTS` is a hash of what that path leads to.
        resume: Continue the unfinished run that the folder holds.

    Attributes:
        status: running → done | failed | cancelled.
        best_effort: The folder only serves to resume: the run continues without what cannot be written there.
    """

    def __init__(
        self,
        folder: Path | None,
        command: str,
        options: Mapping[str, Any],
        seed: int,
        device: str,
        facts: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.resume, self.best_effort = folder, resume, False
        self.status = "running"
        self.error: str | None = None
        self.command, self.options, self.device, self.seed = command, dict(options), device, seed
        self.facts, self.versions = dict(facts or {}), versions()
        self.resumed = 0
        self.concepts: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.hints: list[dict[str, Any]] | None = None
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.timings: dict[str, float] = {}
        self.peak_memory: dict[str, int | None] = {"cpu_bytes": None, "device_bytes": None}
        self.mask: dict[str, Any] | None = None
        self.rounding: dict[str, Any] | None = None
        self.losses: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.more: dict[str, Any] = {}

    def as_json(self) -> dict[str, Any]:
        """The contents of `run.json`: all parts, and those of `more` after them."""
        parts = {name: getattr(self, name) for name in blank_record() if name != "schema"}
        extra = {name: value for name, value in (("hints", self.hints), ("error", self.error)) if value is not None}
        return {"schema": SCHEMA, **parts, **extra, **self.more}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager: run inside; at the end its status, log and peak memory are written, also on errors.

        Raises ConfigError if the folder is used by another run, or holds a finished run or one with other options.
        """
        if self.folder is None:
            yield from self._run()
            return
        check_links(self.folder)
        with exclusive_lock(self.folder):
            previous = check_folder(self.folder, self.resume)
            if previous is not None:
                self._resume_from(previous)
            yield from self._run()

    def state(self, name: str) -> Path | None:
        """The path of a file of the state to resume from; None for a run without a folder."""
        return self.folder / STATE / name if self.folder is not None else None

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the result depends on; a saved state with this hash belongs to this run."""
        text = json.dumps(_fingerprint_inputs(self.as_json()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_resumes(self, previous: Mapping[str, Any]) -> None:
        """Raises ConfigError if this run is not the continuation of the previous one."""
        differing = _differences(previous, self.as_json())
        if differing:
            raise ConfigError(
                f"{self.folder} holds a run that cannot be resumed with these options: {'; '.join(differing[:4])}",
                option="run_dir",
                advice="Repeat its options, or choose another folder",
                code="other-options",
            )

    def _resume_from(self, previous: Mapping[str, Any]) -> None:
        self.check_resumes(previous)
        assert self.folder is not None
        for name in FILES:
            remove_leftovers(self.folder / name)
        self.command = previous.get("command", self.command)
        self.timings = dict(previous.get("timings", {}))
        self.resumed = int(previous.get("resumed", 0)) + 1

    def _run(self) -> Iterator[None]:
        handler: logging.Handler | None = None
        if self.folder is not None:
            handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8", errors="backslashreplace")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
        self.write()
        try:
            yield
            if self.folder is not None:  # first, so that a finished run never holds one
                shutil.rmtree(self.folder / STATE, ignore_errors=True)
            self.status = "done"
        except BaseException as error:
            stopped = isinstance(error, Cancelled | KeyboardInterrupt)
            self.status = "cancelled" if stopped else "failed"
            self.error = str(error) or type(error).__name__
            logger.log(logging.INFO if stopped else logging.ERROR, "%s: %s", self.status, self.error)
            raise
        finally:
            self.peak_memory = peak_memory()
            self.write()
            if handler is not None:
                logger.removeHandler(handler)
                handler.close()

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Context manager: time a stage; further times of the same stage add up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - began, 3)
            logger.info("%s: %.1f s", stage, self.timings[stage])
            self.write()

    def add_input(self, kind: str, path: Path, shown: str) -> None:
        """Add a file that was read, with size and sha256; `shown` is its path in the record (never absolute)."""
        self.inputs.append(_file_entry(kind, path, shown))

    def add_output(self, kind: str, path: Path, shown: str) -> None:
        """Add a file that was written, as `add_input` does."""
        self.outputs.append(_file_entry(kind, path, shown))

    def write(self) -> None:
        """Write `run.json` atomically. An error of writing is only logged while another is being raised, or where the
        folder is kept on a best effort.
        """
        if self.folder is None:
            return
        raised = sys.exc_info()[1]
        text = json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n"
        try:
            write_bytes(self.folder / "run.json", text.encode("utf-8", "backslashreplace"))  # a name that is not UTF-8
        except ModelError as error:
            if raised is None and not self.best_effort:
                raise
            logger.warning("run.json could not be updated: %s", error)


def _file_entry(kind: str, path: Path, shown: str) -> dict[str, Any]:
    return {"kind": kind, "path": shown, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _fingerprint_inputs(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the outputs' bytes depend on in a record; inputs count by the hash in the facts, not by path."""
    paths = [name for name in INPUTS if data["facts"].get(name)]
    options = {name: value for name, value in data["options"].items() if name not in (*NOT_IN_FINGERPRINT, *paths)}
    versions = {name: value for name, value in data["versions"].items() if name in (*PACKAGES, "python")}
    return {"options": options, "facts": {**data["facts"], "device": data["device"]}, "versions": versions}


def _differences(previous: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The differences of two records in what the outputs' bytes depend on, one line each."""
    was, now = _fingerprint_inputs(previous), _fingerprint_inputs(present)
    lines = []
    for part in now:
        for name in sorted({*was[part], *now[part]}):
            old, new = was[part].get(name), now[part].get(name)
            if old == new or (part == "facts" and name == "parts" and was[part].get("model") != now[part].get("model")):
                continue  # implied by the difference of the model
            if part == "facts" and old and new and name in INPUTS:
                path, had = (data["options"].get(name) for data in (present, previous))
                lines.append(f"{name} {path!r} has the content {new[:12]}…, but {had!r} had {old[:12]}…")
            else:
                lines.append(f"{name} was {_short(old)} and is {_short(new)}")
    return [line[:300] for line in lines]  # values may be untrusted input


def _short(value: Any) -> str:
    """A value for a message; a hash is shortened to 12 digits."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}…" if is_hash else repr(value)
