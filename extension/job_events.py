"""The events of a job's process, one JSON object per line, and how each changes the job.

- {"event": "stage", "stage", "step", "total", "fraction", "left": [seconds at least, at most] or null, "metrics"}
- {"event": "message", "text"}
- {"event": "preview", "file", "step"}
- {"event": "stopping"}
- {"event": "result", "result"}
- {"event": "error", "error": {"message", "option", "advice", "code"}}
"""

from __future__ import annotations

import json

from salun.progress import Stage

from .jobs import Job
from .limits import truncated
from .messages import from_fields, to_fields

MAX_LOSSES = 2_000  # points of the loss plot
MAX_NOTES = 100  # messages of a job


def apply_event(job: Job, line: str) -> None:
    """Update a job by a line of its process; a line without an event is ignored.

    Raises KeyError, TypeError or ValueError for an incomplete event.
    """
    try:
        event = json.loads(line, parse_constant=reject_nan)
        kind = event["event"]
    except (ValueError, KeyError, TypeError):
        return
    if kind == "stage":
        job.stage, job.step, job.total = event["stage"], event["step"], event["total"]
        job.fraction, job.left = max(job.fraction, event["fraction"]), event["left"]
        metrics = event["metrics"]
        if None not in (metrics.get("forget"), metrics.get("retain")):
            job.losses.append([job.step, metrics["forget"], metrics["retain"]])
            del job.losses[:-MAX_LOSSES]
    elif kind == "message":
        job.notes.append(truncated(event["text"]))
        del job.notes[:-MAX_NOTES]
    elif kind == "preview":
        job.previews.append(event["file"])
    elif kind == "stopping":
        job.stage = Stage.STOPPING
    elif kind == "result":
        job.result, job.fraction = event["result"], 1.0
    elif kind == "error":
        job.error = to_fields(from_fields(event["error"]))


def reject_nan(text: str) -> None:
    """Returns None for NaN and the infinities, which JSON lacks but Python writes."""
