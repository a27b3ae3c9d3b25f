"""A job: one task that runs in a child process, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .messages import from_fields

OPEN = ("queued", "waiting", "running", "stopping")


@dataclass
class Job:
    """What is known of a job.

    Args:
        request: What the child process is asked to do: its options, files and names.
        state: queued → waiting (for the GPU) → running → done | failed | cancelled; stopping in between.
        fraction: How much is done, 0 to 1; it never falls.
        left: Seconds left, None where that is not known.
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
    left: float | None = None
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
        found: dict[str, Any] = self.request.get("options", {})
        return found

    @property
    def outputs(self) -> list[str]:
        """Paths of the files and folders that it writes, its run folder apart."""
        return [path for path in [*(self.options.get("output") or []), self.request.get("output")] if path]

    @property
    def model(self) -> str | None:
        """The model it works on, as salun takes it."""
        return self.options.get("model") or self.request.get("model")


def is_same_request(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two requests ask for the same, wherever they would write it. Resuming is asked for one run."""

    def compared(request: Mapping[str, Any]) -> Any:
        options = {k: v for k, v in request.get("options", {}).items() if k not in ("run_dir", "output")}
        run = request["options"].get("run_dir") if request.get("resume") else None
        return {**{k: v for k, v in request.items() if k != "output"}, "options": options, "resume": run}

    return bool(compared(first) == compared(second))


def is_valid(job: Job) -> bool:
    """Whether what was read from a file, which may be untrusted input, is of the types that this code counts on."""
    request = job.request if isinstance(job.request, dict) else {"options": None}
    options = request.get("options", {})
    if not isinstance(options, dict):
        return False
    optional_texts = (
        options.get("run_dir"), options.get("model"), request.get("output"), request.get("model"), job.run,
    )  # fmt: skip
    return (
        all(isinstance(text, str) for text in (job.id, job.kind, job.title, job.state, job.stage))
        and all(isinstance(text or "", str) for text in optional_texts)
        and all(_are_texts(texts) for texts in (options.get("output") or [], job.previews, job.notes))
        and all(_is_number(value) for value in (job.created, job.step, job.total, job.fraction))
        and all(value is None or _is_number(value) for value in (job.began, job.ended, job.left))
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
