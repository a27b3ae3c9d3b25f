"""The HTTP API `/salun/v1/…`: start, status, cancel, resume, remove, use, undo, runs, models, concepts, files of runs.

JSON in, JSON out; `openapi.json` describes the calls, `schema` the options. Errors are {"error": text}:
400 for an invalid request, 401 and 403 from `access`, 404 for a missing object, 408, 413 and 415 from `body`, 429 for a
full queue.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from salun.errors import ConfigError, SalunError
from salun.time_left import in_words

from .access import Access, Rejected, headers_of
from .bodies import STARTS, JobId
from .body import LARGEST, json_object, read_body
from .controls import ATTACK, ERASURE, EVALUATION, Controls
from .job_queue import QueueFull
from .jobs import Job
from .limits import truncated
from .markup import loss_chart
from .messages import from_fields, render, stage_label
from .service import Service

PREFIX = "/salun/v1"
POINTS = 200  # of a job's loss plot in a status
PREVIEWS = 20  # names of the latest in a status
OVERDUE = 10.0  # seconds after the estimated end until no time left is shown
RECENT = 50  # jobs in a status, besides open and resumable ones
SCRIPTS = {  # the page's files of the page that are served to all: they are in the public repository
    **dict.fromkeys(("page.js", "page_cards.js", "page_dom.js", "page_try.js"), "text/javascript"),
    "page.css": "text/css",
}
STRICT = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "sandbox; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
JOB_FIELDS = (
    "id", "kind", "title", "state", "open", "created", "began", "ended", "stage", "step", "total", "fraction", "run",
    "resumable",
)  # fmt: skip
logger = logging.getLogger("salun")


class Error(BaseModel):
    """The response to a failed request."""

    error: str


# -- routes -----------------------------------------------------------------------------------------------------------


def add_routes(app: Any, service: Service, access: Access) -> None:
    """Add the API to a Starlette or FastAPI application."""
    api = FastAPI(
        title="salun", docs_url=None, redoc_url=None, openapi_url=None, servers=[{"url": PREFIX}],
        default_response_class=_Json, responses={"4XX": {"model": Error, "description": "The request failed."}},
    )  # fmt: skip
    api.state.service, api.state.access = service, access
    api.router.route_class = _GuardedRoute
    api.router.redirect_slashes = False
    for path, (method, answer, extra) in _ROUTES.items():
        api.add_api_route(f"/{path}", answer, methods=[method], response_model=None, openapi_extra=extra)
    for name in SCRIPTS:
        api.add_route(f"/{name}", _script, methods=["GET"])
    app.mount(PREFIX, api)


class _Json(JSONResponse):
    """JSON with null for numbers that JSON does not have, and “?” for unpaired surrogates."""

    def render(self, content: Any) -> bytes:
        return super().render(_plain(content))


class _CheckedRequest(Request):
    """A request whose body was read and checked."""

    checked: dict[str, Any]

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self.checked


class _GuardedRoute(APIRoute):
    """A route that checks access, bounds bodies, and turns errors into JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                response = await handler(await _admitted(request))
            except Exception as error:
                response = _error_response(error, request)
            response.headers.update(STRICT)
            return response

        return guarded


async def _admitted(request: Request) -> Request:
    """The request, if access allows it, with its checked body. Raises Rejected."""
    headers = headers_of(request.scope["headers"])
    request.app.state.access.check(headers)
    if request.method != "POST":
        return request
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Rejected(415, "the request is not JSON: send JSON with Content-Type: application/json")
    checked = _CheckedRequest(request.scope, request.receive)
    checked.checked = json_object(await read_body(request.receive, headers, LARGEST))
    return checked


def _error_response(error: Exception, request: Request) -> Response:
    headers = {}
    if isinstance(error, Rejected):
        status, text = error.status, error.text
        headers = {"WWW-Authenticate": 'Basic realm="salun"'} if error.challenge else {}
    elif isinstance(error, SalunError):
        missing = 404 if error.code in ("not-found", "no-model") else 400
        status = 429 if isinstance(error, QueueFull) else missing
        text = _service(request).runs.without_paths(render(error, spell=str))  # names as in JSON
    elif isinstance(error, RequestValidationError | ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        status, text = 400, f"{truncated(place, 80) or 'the request'}: {first['msg']}"
    else:
        logger.error("%s", request.url.path, exc_info=error)
        status, text = 500, "internal error; see the program's log"
    return _Json({"error": text}, status, headers)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def _script(request: Request) -> Response:
    name = request.url.path.rsplit("/", 1)[-1]
    return FileResponse(Path(__file__).with_name(name), media_type=SCRIPTS[name], headers={"Cache-Control": "no-cache"})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# -- answers ----------------------------------------------------------------------------------------------------------


def start(request: Request, body: dict[str, Any]) -> Any:
    """Start a job, or return the open one with the same request."""
    given = {name: value for name, value in body.items() if value is not None}
    kind = given.get("kind", "erase")
    if not isinstance(kind, str) or kind not in STARTS:
        raise ConfigError(f"kind is {str(kind)[:40]!r}, but must be one of {', '.join(STARTS)}")
    arguments = dict(STARTS[kind](**given))
    del arguments["kind"]
    service = _service(request)
    return job_to_json(getattr(service.requests, kind)(**arguments), service)


def status(request: Request, id: str | None = None) -> Any:
    """One job, or all jobs; in the list, finished jobs come without their losses."""
    service = _service(request)
    if id:
        return job_to_json(service.queue.get(id), service)
    jobs = [job for n, job in enumerate(service.queue.all()) if job.open or job.resumable or n < RECENT]
    listed = [{**job_to_json(job, service), **({} if job.open else {"losses": []})} for job in jobs]  # sent each second
    return {"host": service.host.name, "jobs": listed}


def cancel(request: Request, body: JobId) -> Any:
    """Stop a job, or remove it from the queue."""
    return job_to_json(_service(request).queue.cancel(body.id), _service(request))


def resume(request: Request, body: JobId) -> Any:
    """Resume the run of a stopped job; a new job is returned."""
    return job_to_json(_service(request).queue.resume(body.id), _service(request))


def remove(request: Request, body: JobId) -> Any:
    """Remove an ended job from the list, and delete its training state."""
    _service(request).remove(body.id)
    return {"removed": body.id}


def use(request: Request, body: JobId) -> Any:
    """Make the WebUI use the checkpoint that a job wrote."""
    return {"message": _service(request).use_result(body.id)}


def undo(request: Request, body: JobId) -> Any:
    """Make the WebUI use the base of an erasure again, or write the base again."""
    return {"message": _service(request).undo_result(body.id)}


def runs(request: Request) -> Any:
    """All runs, the latest first."""
    return {"runs": _service(request).history()}


def models(request: Request) -> Any:
    """The available models."""
    return {"models": [{"title": title} for title in _service(request).models.all()]}


def concepts(request: Request, model: str | None = None) -> Any:
    """The concepts of a model, and their anchors."""
    return {"concepts": _service(request).models.concepts(model)}


def file(request: Request, run: str, name: str) -> Any:
    """A file of a run: report.html, run.json, …"""
    path, kind = _service(request).runs.file(run, name)
    return FileResponse(path, media_type=kind)


def preview(request: Request, id: str, name: str) -> Any:
    """A preview image of a job."""
    return FileResponse(_service(request).preview(id, name), media_type="image/png")


def losses(request: Request, id: str) -> Any:
    """The chart of a job's losses as SVG, of its whole run once it is done; empty before its first training step."""
    service = _service(request)
    job = service.queue.get(id)
    chart = ""
    if job.state == "done" and job.run:
        with suppress(SalunError):  # a run whose folder was removed
            chart = service.runs.losses(job.run)
    chart = chart or loss_chart({"step": row[0], "forget": row[1], "retain": row[2]} for row in job.losses)
    return Response(chart, media_type="image/svg+xml")


def evaluation(request: Request, id: str) -> Any:
    """The page of an evaluation or of attacks, by its job."""
    return FileResponse(_service(request).evaluation(id), media_type="text/html; charset=utf-8")


def schema() -> dict[str, Any]:
    """Every option of an erasure, and under `evaluation` and `attack` of these, with type, default, range and help."""
    return {
        "version": 1,
        "prefix": PREFIX,
        "options": _options_to_json(ERASURE),
        "evaluation": _options_to_json(EVALUATION),
        "attack": _options_to_json(ATTACK),
    }


def _options_to_json(controls: Controls) -> dict[str, Any]:
    options = {}
    for title, names in controls.groups.items():
        for name in (name for name in names if name in controls.fields):
            item = controls.fields[name]
            rules = {key: item.metadata[key] for key in ("minimum", "maximum", "above")}
            rules["choices"] = list(item.metadata["choices"]) or None
            options[name] = {
                "group": title,
                "type": str(item.type),
                "default": item.default if item.default is not dataclasses.MISSING else [],
                "help": controls.help_of(name),
                **{key: rule for key, rule in rules.items() if rule is not None},
            }
    return options


def openapi(request: Request) -> Any:
    """This description of the API."""
    return request.app.openapi()


def _schema_of(model: type[BaseModel]) -> Any:
    """A model's JSON schema, by pydantic 2 or 1."""
    return getattr(model, "model_json_schema", model.schema)()


_START_BODY = {"schema": {"oneOf": [_schema_of(model) for model in STARTS.values()]}}
_ROUTES: dict[str, tuple[str, Callable[..., Any], dict[str, Any] | None]] = {
    "start": ("POST", start, {"requestBody": {"content": {"application/json": _START_BODY}}}),
    **{answer.__name__: ("POST", answer, None) for answer in (cancel, resume, remove, use, undo)},
    **{
        answer.__name__: ("GET", answer, None)
        for answer in (status, runs, models, concepts, schema, file, preview, losses, evaluation)
    },
    "openapi.json": ("GET", openapi, None),
}


def job_to_json(job: Job, service: Service) -> dict[str, Any]:
    """A job as the API describes it: the loss plot thinned out, texts without paths of this machine."""

    def shown(text: str) -> str:
        return truncated(service.runs.without_paths(truncated(text), job.model))

    step, left = -(-len(job.losses) // POINTS) or 1, _left(job)
    result = {k: v for k, v in (job.result or {}).items() if k not in ("run_dir", "layers")}
    if isinstance(result.get("output"), str):
        result["output"] = Path(result["output"].rstrip("/")).name
    return {
        **{name: getattr(job, name) for name in JOB_FIELDS},
        "left": left,
        "time_left": in_words(left),
        "stage_label": stage_label(job.stage),
        "losses": job.losses[::step],
        "previews": job.previews[-PREVIEWS:],
        "notes": [shown(note) for note in job.notes[-20:]],
        "error": shown(render(from_fields(job.error))) if job.error is not None else None,
        "result": _each_text(result, shown) if job.result is not None else None,
        "offers": service.offers(job),
        "kept_bytes": service.kept_bytes(job),
    }


def _left(job: Job) -> tuple[float, float] | None:
    """Estimated seconds left, at least and at most, counted down since the job's process reported; None if overdue."""
    if job.left is None or job.heard is None:
        return None
    silence, (low, high) = time.time() - job.heard, job.left
    return None if silence > high + OVERDUE else (max(low - silence, 0.0), max(high - silence, 0.0))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value
