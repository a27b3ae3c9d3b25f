"""The HTTP API `/salun/v1/…`: start, status, cancel, resume, use, undo, runs, models, concepts, schema, files of runs.

JSON in, JSON out. Errors are {"error": text}: 400 for what cannot be, 401 and 403 as `access` tells, 404 for what is
not there, 408, 413 and 415 for bodies that are none of ours, 429 for more jobs than the queue holds.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from salun.diffusion.options import GROUPS
from salun.errors import ConfigError, SalunError

from .access import Access, Refused, headers_of
from .body import LARGEST, json_object, read_body
from .controls import FIELDS, help_of
from .jobs import Job, QueueFull
from .service import Service
from .words import in_the_pages_words

PREFIX = "/salun/v1"
POINTS = 200  # of a loss plot in a status
PREVIEWS = 20  # names of the latest in a status
RECENT = 50  # jobs in a status, beside those that are not over or can be resumed
SCRIPT = Path(__file__).with_name("page.js")
STRICT = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "sandbox; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
logger = logging.getLogger("salun")


def add_routes(app: Any, service: Service, access: Access) -> None:
    """Add the API to a Starlette or FastAPI application."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response

    def guarded(answer: Callable[[Mapping[str, Any]], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            try:
                headers = headers_of(request.scope["headers"])
                access.check(headers)
                asked = await _asked(request, headers)
                found = await run_in_threadpool(answer, asked)
            except Refused as error:
                asking = {"WWW-Authenticate": 'Basic realm="salun"'} if error.challenge else {}
                return JSONResponse({"error": error.text}, error.status, {**STRICT, **asking})
            except SalunError as error:
                text = in_the_pages_words(service.without_places(str(error)))
                return JSONResponse({"error": text}, _status_of(error), STRICT)
            except Exception:
                logger.exception("%s", request.url.path)
                return JSONResponse({"error": "an error of salun's own: the program's log tells more"}, 500, STRICT)
            if isinstance(found, _File):
                return FileResponse(found.path, media_type=found.kind, headers=STRICT)
            return JSONResponse(_plain(found), headers=STRICT)

        return handle

    async def script(request: Request) -> Response:
        return FileResponse(SCRIPT, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    for path, (method, answer) in _answers(service).items():
        app.add_route(f"{PREFIX}/{path}", guarded(answer), methods=[method])
    app.add_route(f"{PREFIX}/page.js", script, methods=["GET"])  # public: it is in the public repository


def _status_of(error: SalunError) -> int:
    if isinstance(error, QueueFull):
        return 429
    missing = isinstance(error, ConfigError) and str(error).startswith(("there is no", "no model"))
    return 404 if missing else 400


def _text(asked: Mapping[str, Any], name: str) -> str:
    """An argument that must be a text."""
    value = asked.get(name)
    if not isinstance(value, str):
        given = f"is {repr(value)[:40]}, but" if name in asked else "is missing: it"
        raise ConfigError(f"{name} {given} must be a text")
    return value


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    kind: str


async def _asked(request: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of a request: of its query for GET, of its JSON body for POST."""
    if request.method != "POST":
        return dict(request.query_params)
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send JSON, with Content-Type: application/json")
    return json_object(await read_body(request.receive, headers, LARGEST))


def _plain(value: Any) -> Any:
    """A value with null for numbers that JSON has not, and “?” for halves of characters."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(service: Service) -> dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]]:
    """Path → (method, what answers)."""

    def show(job: Job) -> dict[str, Any]:
        model = job.request.get("options", {}).get("model") or job.request.get("model")

        def words(text: str) -> str:
            return in_the_pages_words(service.without_places(text, model))

        return {**told(job, words), "offers": service.offers(job), "kept_bytes": service.kept(job)}

    def start(asked: Mapping[str, Any]) -> Any:
        asked = {name: value for name, value in asked.items() if value is not None}
        kind = asked.pop("kind", "erase")
        if not isinstance(kind, str) or kind not in STARTS:
            raise ConfigError(f"kind is {str(kind)[:40]!r}, but must be one of {', '.join(STARTS)}")
        for name in asked:
            if name not in STARTS[kind]:
                raise ConfigError(f"{kind} takes {', '.join(STARTS[kind])}, not {str(name)[:40]!r}")
        for name, wanted in STARTS[kind].items():
            if name in asked and not _fits(asked[name], wanted):
                raise ConfigError(f"{name} must be {wanted}")
        begin = getattr(service, kind)
        try:
            inspect.signature(begin).bind(**asked)
        except TypeError as error:
            raise ConfigError(f"{kind} needs more: {error}") from error
        return show(begin(**asked))

    def forget(asked: Mapping[str, Any]) -> Any:
        service.forget(_text(asked, "id"))
        return {"forgotten": asked["id"]}

    def status(asked: Mapping[str, Any]) -> Any:
        if asked.get("id"):
            return show(service.queue.get(str(asked["id"])))
        jobs = [job for n, job in enumerate(service.queue.all()) if job.open or job.resumable or n < RECENT]
        shown = [{**show(job), **({} if job.open else {"losses": []})} for job in jobs]  # asked for once a second
        return {"host": service.host.name, "jobs": shown}

    def runs(asked: Mapping[str, Any]) -> Any:
        found = service.history()
        return {"runs": [{**run, "error": in_the_pages_words(run["error"]) if run["error"] else None} for run in found]}

    return {
        "start": ("POST", start),
        "status": ("GET", status),
        "cancel": ("POST", lambda asked: show(service.queue.cancel(_text(asked, "id")))),
        "resume": ("POST", lambda asked: show(service.queue.resume(_text(asked, "id")))),
        "forget": ("POST", forget),
        "use": ("POST", lambda asked: {"said": service.use_result(_text(asked, "id"))}),
        "undo": ("POST", lambda asked: {"said": service.undo_result(_text(asked, "id"))}),
        "runs": ("GET", runs),
        "models": ("GET", lambda asked: {"models": [{"title": title} for title in service.models()]}),
        "concepts": ("GET", lambda asked: {"concepts": service.concepts(asked.get("model"))}),
        "schema": ("GET", lambda asked: schema()),
        "file": ("GET", lambda asked: _File(*service.file(_text(asked, "run"), _text(asked, "name")))),
        "preview": (
            "GET",
            lambda asked: _File(service.preview(_text(asked, "id"), _text(asked, "name")), "image/png"),
        ),
    }


STARTS: dict[str, dict[str, str]] = {
    "erase": {"options": "an object", "preview_every": "a whole number", "name": "a text"},
    "mask": {"options": "an object"},
    "stack": {"model": "a text", "deltas": "a list of texts", "strengths": "a list of numbers", "name": "a text"},
    "undo": {"model": "a text", "delta": "a text", "name": "a text"},
    "export": {"delta": "a text", "form": "a text", "rank": "a whole number", "model": "a text"},
    "overlaps": {"deltas": "a list of texts"},
    "inspect": {"run": "a text", "against": "a text"},
}
"""Kind of job → its arguments and what they must be."""


def _fits(value: Any, wanted: str) -> bool:
    if wanted.startswith("a list"):
        inner = str if wanted.endswith("texts") else (int, float)
        return isinstance(value, list) and all(isinstance(v, inner) and not isinstance(v, bool) for v in value)
    kinds = {"an object": dict, "a text": str, "a whole number": int}
    return isinstance(value, kinds[wanted]) and not isinstance(value, bool)


def told(job: Job, words: Callable[[str], str]) -> dict[str, Any]:
    """A job as the API tells it: the loss plot thinned out, every message as `words` has it."""
    step = -(-len(job.losses) // POINTS) or 1
    result = {k: v for k, v in (job.result or {}).items() if k not in ("run_dir", "layers")}
    if isinstance(result.get("output"), str):
        result["output"] = Path(result["output"].rstrip("/")).name
    return {
        **{name: getattr(job, name) for name in TOLD},
        "losses": job.losses[::step],
        "previews": job.previews[-PREVIEWS:],
        "notes": [words(note) for note in job.notes[-20:]],
        "error": words(job.error) if job.error is not None else None,
        "result": _each_text(result, words) if job.result is not None else None,
    }


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value


TOLD = ("id", "kind", "title", "state", "created", "began", "ended", "stage", "step", "total", "fraction", "left",
        "run", "resumable")  # fmt: skip


def schema() -> dict[str, Any]:
    """The API's own description: what may be started with which arguments, and every option of an erasure."""
    options = {}
    for title, names in GROUPS.items():
        for name in names:
            if name in FIELDS:
                item = FIELDS[name]
                rules = {
                    key: item.metadata[key] for key in ("minimum", "maximum", "above") if item.metadata[key] is not None
                }
                options[name] = {
                    "group": title,
                    "type": str(item.type),
                    "default": item.default if item.default is not dataclasses.MISSING else [],
                    "help": help_of(name),
                    **({"choices": list(item.metadata["choices"])} if item.metadata["choices"] else {}),
                    **rules,
                }
    paths = {
        "GET status": {"id": "a job's id, or nothing for all (losses: of those that are not over)"},
        "POST start": {"kind": list(STARTS), "arguments": STARTS},
        "POST cancel": {"id": "a job's id"},
        "POST resume": {"id": "a job's id"},
        "POST forget": {"id": "a job's id"},
        "POST use": {"id": "of a job that wrote a checkpoint"},
        "POST undo": {"id": "of an erasure"},
        "GET runs": {}, "GET models": {}, "GET schema": {},
        "GET concepts": {"model": "a model's title, or nothing"},
        "GET file": {"run": "a run's name", "name": "report.html, run.json, …"},
        "GET preview": {"id": "a job's id", "name": "one of its previews"},
    }  # fmt: skip
    return {"version": 1, "prefix": PREFIX, "paths": paths, "options": options}
