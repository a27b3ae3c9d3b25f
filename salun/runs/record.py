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
from salun.runs.folder import FILES, STATE, check_folder, check_links, exclusive_lock
from salun.runs.reading import blank_record

NOT_IN_FINGERPRINT = (  # options on which no output's bytes depend
    "output", "run_dir", "models_dir", "allow_pickle", "show_sensitive", "save_every", "workers",
)  # fmt: skip
INPUTS = (  # options that are paths of inputs; where `facts` have one's name, its content is identified by that
    "model", "components", "mask", "forget_images", "retain_images", "data", "original", "forget",
)  # fmt: skip
logger = logging.getLogger("salun")


class RunRecord:
    """Collects what a run did; kept in `folder/run.json` where a folder is given, in memory otherwise.

    status: running → done | failed | cancelled. facts: what the run's result depends on beside its options and the
    versions. A fact with the name of one of `INPUTS` is a hash of what that path leads to. resume: continue the
    unfinished run that the folder holds. in_passing: the folder only serves to resume, so that a run continues without
    what cannot be written there.
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
        self.folder, self.resume, self.in_passing = folder, resume, False
        self.data: dict[str, Any] = {
            **blank_record(),
            "status": "running",
            "command": command,
            "options": dict(options),
            "device": device,
            "facts": dict(facts or {}),
            "seed": seed,
            "versions": versions(),
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the run is on; at the end its status, log and peak memory are written, whatever happened.

        Raises ConfigError if the folder is another run's: one at work, a finished one, or one of other options.
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
        """Where a file is kept until the run is done, so that it can be resumed; None for a run without a folder."""
        return self.folder / STATE / name if self.folder is not None else None

    @property
    def fingerprint(self) -> str:
        """A hash of all that the result depends on: what is saved under it fits this run and no other."""
        text = json.dumps(_fingerprint_inputs(self.data), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_resumes(self, previous: Mapping[str, Any]) -> None:
        """Raises ConfigError if this run is not the continuation of the previous one."""
        differing = _differences(previous, self.data)
        if differing:
            raise ConfigError(
                f"--run-dir {self.folder} holds a run that cannot be resumed like this: {'; '.join(differing[:4])}. "
                "Repeat its options, or name another folder",
                code="options-changed",
            )

    def _resume_from(self, previous: Mapping[str, Any]) -> None:
        self.check_resumes(previous)
        assert self.folder is not None
        for name in FILES:
            remove_leftovers(self.folder / name)
        self.data["command"] = previous.get("command", self.data["command"])
        self.data["timings"] = dict(previous.get("timings", {}))
        self.data["resumed"] = int(previous.get("resumed", 0)) + 1

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
            self.data["status"] = "done"
        except BaseException as error:
            stopped = isinstance(error, Cancelled | KeyboardInterrupt)
            self.data["status"] = "cancelled" if stopped else "failed"
            self.data["error"] = str(error) or type(error).__name__
            logger.log(logging.INFO if stopped else logging.ERROR, "%s: %s", self.data["status"], self.data["error"])
            raise
        finally:
            self.data["peak_memory"] = peak_memory()
            self.write()
            if handler is not None:
                logger.removeHandler(handler)
                handler.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the same name adds up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            timings = self.data["timings"]
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - began, 3)
            logger.info("%s: %.1f s", name, timings[name])
            self.write()

    def note_file(self, side: str, kind: str, path: Path, shown: str) -> None:
        """Add a file to `inputs` or `outputs`, with size and sha256; `shown` is its path as told (never absolute)."""
        self.data[side].append({"kind": kind, "path": shown, "bytes": path.stat().st_size, "sha256": sha256_file(path)})

    def write(self) -> None:
        """Write `run.json`, whole or not at all. An error of writing is only logged while another is on its way up, or
        for a folder that serves `in_passing`.
        """
        if self.folder is None:
            return
        under_way = sys.exc_info()[1]
        text = json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"
        try:
            write_bytes(self.folder / "run.json", text.encode("utf-8", "backslashreplace"))  # a name that is not UTF-8
        except ModelError as error:
            if under_way is None and not self.in_passing:
                raise
            logger.warning("run.json is as it was: %s", error)


def _fingerprint_inputs(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a record, what the outputs' bytes depend on: not the paths of inputs whose content is identified by a fact."""
    paths = [name for name in INPUTS if data["facts"].get(name)]
    options = {name: value for name, value in data["options"].items() if name not in (*NOT_IN_FINGERPRINT, *paths)}
    versions = {name: value for name, value in data["versions"].items() if name in (*PACKAGES, "python")}
    return {"options": options, "facts": {**data["facts"], "device": data["device"]}, "versions": versions}


def _differences(previous: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What the outputs' bytes depend on and is not the same in two records, for people."""
    was, now = _fingerprint_inputs(previous), _fingerprint_inputs(present)
    lines = []
    for part in now:
        for name in sorted({*was[part], *now[part]}):
            old, new = was[part].get(name), now[part].get(name)
            if old == new or (part == "facts" and name == "parts" and was[part].get("model") != now[part].get("model")):
                continue  # of another model, its other parts need no word of their own
            if part == "facts" and old and new and name in INPUTS:
                path, had = (data["options"].get(name) for data in (present, previous))
                lines.append(f"{name} {path!r} has other content ({new[:12]}…) than {had!r} had ({old[:12]}…)")
            else:
                lines.append(f"{name} was {_short(old)} and is {_short(new)}")
    return [line[:300] for line in lines]  # values may be untrusted input


def _short(value: Any) -> str:
    """A value as a message shows it: of a hash, its first 12 digits."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}…" if is_hash else repr(value)
