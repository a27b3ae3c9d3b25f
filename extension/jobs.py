"""A job: one task that runs in a child process, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .messages import from_fields

OPEN = ("queued", "waiting", "running", "stopping")


@dataclass
class Job:
    """The request and state of a job.

    Args:
        request: The input of the child process: options, files and names.
        state: queued → waiting (for the GPU) → running → done | failed | cancelled; stopping in between.
        fraction: Progress from 0 to 1; it never decreases.
        left: Estimated seconds left, [at least, at most]; None if unknown. heard: When its process reported last.
        losses: Rows of [step, forget loss, retain loss].
        previews: Names of image files in the job's folder.
        error: Fields of an error, as `messages.to_fields` makes them.
        run: Name of its run folder.
        resumable: Whether its run can be resumed.
    """

    id: str
    kind: str
    title: str
    request: dict[str, Any]
    state: str = "queued"
    created: float = 0.0
    began: float | None = None
    ended: float | None = None
    stage: str = ""
    step: int = 0
    total: int = 0
    fraction: float = 0.0
    left: list[float] | None = None
    heard: float | None = None
    losses: list[list[float]] = field(default_factory=list)
    previews: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: dict[str, str | None] | None = None
    run: str | None = None
    resumable: bool = False

    @property
    def open(self) -> bool:
        return self.state in OPEN

    @property
    def options(self) -> dict[str, Any]:
        """The options of its request; empty for a job without any."""
        options: dict[str, Any] = self.request.get("options", {})
        return options

    @property
    def outputs(self) -> list[str]:
        """Paths of the files and folders that it writes, except for the run folder."""
        return [path for path in [*(self.options.get("output") or []), self.request.get("output")] if path]

    @property
    def model(self) -> str | None:
        """The job's model: alias, path or hub id."""
        return self.options.get("model") or self.request.get("model")


def is_same_request(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two requests differ only in their outputs. Requests to resume are equal only for the same run."""

    def compared(request: Mapping[str, Any]) -> Any:
        options = {k: v for k, v in request.get("options", {}).items() if k not in ("run_dir", "output")}
        run = request["options"].get("run_dir") if request.get("resume") else None
        return {**{k: v for k, v in request.items() if k != "output"}, "options": options, "resume": run}

    return bool(compared(first) == compared(second))


def is_valid(job: Job) -> bool:
    """Whether the fields of a job, read from a file that may be untrusted input, have the expected types."""
    request = job.request if isinstance(job.request, dict) else {"options": None}
    options = request.get("options", {})
    if not isinstance(options, dict):
        return False
    optional_texts = (
        options.get("run_dir"), options.get("model"), request.get("output"), request.get("model"),
        request.get("target"), job.run,
    )  # fmt: skip
    return (
        all(isinstance(text, str) for text in (job.id, job.kind, job.title, job.state, job.stage))
        and all(isinstance(text or "", str) for text in optional_texts)
        and all(_are_texts(texts) for texts in (options.get("output") or [], job.previews, job.notes))
        and all(_is_number(value) for value in (job.created, job.step, job.total, job.fraction))
        and all(value is None or _is_number(value) for value in (job.began, job.ended, job.heard))
        and (job.left is None or _is_range(job.left))
        and isinstance(job.losses, list)
        and isinstance(job.result or {}, dict)
        and isinstance(job.resumable, bool)
        and (job.error is None or _is_error(job.error))
    )


def _is_error(fields: Any) -> bool:
    try:
        from_fields(fields)
    except ValueError:
        return False
    return True


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
