"""The folder of a queue: for each job a folder with `request.json`, `job.json` (its state), a log and previews."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from salun.errors import ConfigError
from salun.files import write_bytes
from salun.runs.reading import read_json

from .jobs import Job, is_valid
from .limits import truncated
from .paths import safe_name

MAX_TITLE = 200  # characters
logger = logging.getLogger("salun")


class JobStore:
    """Jobs on disk. The folder is locked until `close`. Raises ConfigError if another program has locked it."""

    def __init__(self, folder: Path) -> None:
        import filelock

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = filelock.FileLock(folder / ".lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(
                f"another program uses the jobs in {folder}", advice="Close it, or choose another folder"
            ) from error

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.release()

    def add(self, job: Job) -> None:
        """Write a new job. Raises ConfigError if that fails, without leaving a folder."""
        place = self.folder / job.id
        try:
            place.mkdir()
            _write_json(place / "request.json", {**job.request, "kind": job.kind})
            _write_json(place / "job.json", asdict(job))
        except Exception as error:  # a full disk, values that JSON lacks, …
            shutil.rmtree(place, ignore_errors=True)
            raise ConfigError(f"the job cannot be written to disk: {error}") from error

    def save(self, job: Job) -> None:
        """Write a job's state. A failure, such as a full disk, is only logged: it must not end the queue."""
        try:
            _write_json(self.folder / job.id / "job.json", asdict(job))
        except Exception as error:
            logger.warning("the state of the job %s is not saved: %s", job.id, error)

    def remove(self, job_id: str) -> None:
        """Delete a job's folder."""
        shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def can_start(self, job_id: str) -> bool:
        """Whether a job's request exists."""
        return (self.folder / job_id / "request.json").is_file()

    def read(self) -> Iterator[Job]:
        """Every job in the folder, which may be untrusted input; invalid ones are skipped with a warning."""
        for file in self.folder.glob("*/job.json"):
            try:
                job = Job(**read_json(file))
                if job.id != file.parent.name or not is_valid(job):
                    raise ValueError("its fields have wrong types")
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s is not a valid job and is skipped: %s", ascii(str(file)), error)
                continue
            job.title = truncated(job.title, MAX_TITLE)
            yield job

    def new_id(self, title: str) -> str:
        """A new id, made of the time and a title."""
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(title, 'job')}"
        name, n = stem, 1
        while (self.folder / name).exists():
            n += 1
            name = f"{stem}-{n}"
        return name


def _write_json(path: Path, data: Any) -> None:
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode("ascii"))
