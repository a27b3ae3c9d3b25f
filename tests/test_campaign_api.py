"""Seeded hostile requests to the HTTP API and to what stands in front of `salun ui`: answered, soon, never by a 500.

A request is raw ASGI, so that headers, paths and bodies can be what no client would send.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from salun.errors import SalunError

from .campaign import Findings, in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extension.access import Access
    from extension.service import Service

CASES = 1_500
GETS = ["status", "runs", "models", "concepts", "schema", "openapi.json", "file", "preview", "evaluation"]
POSTS = ["start", "cancel", "resume", "remove", "use", "undo"]
ROUTES = {**dict.fromkeys(POSTS, "POST"), **dict.fromkeys(GETS, "GET")}
TEXTS = [
    "", "circle", "shapes", "a" * 3_000, "--run-dir : " * 11_000, "\0",
    "\ud800", "../..", "/etc/passwd", "C:\\x", "a\u0316\u0301" * 20_000, "run", "nowhere", "\u202e", "[" * 50_000,
    "(" * 30_000, "` --allow-pickle (" * 5_000, " " * 100_000, "9" * 4_000, "NaN", "con", "run.json", "é" * 500,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 7, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], {"": {}},
    [1, "a"], ["circle"], ["circle"] * 2_000,
]  # fmt: skip
BODIES = [
    b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 100_000, b'{"id": 1e999}',
    b'{"id": "\\ud800"}', b'{"id": "a", "id": ["b"]}', b" " * 1_000_001, b'"' + b"a" * 500_000, b"\0" * 1_000,
]  # fmt: skip
HOSTS = [b"127.0.0.1:7870"] * 60 + [
    b"", b"evil.example", b"127.0.0.1:7870.evil.example", b"\xff", b"[::1", b"a" * 10_000, b"127.0.0.1:99999",
]  # fmt: skip
ORIGINS = [None] * 60 + [b"http://127.0.0.1:7870", b"null", b"http://evil.example", b"\xff", b"://", b"a" * 10_000]


def mutated(rng: random.Random, depth: int = 0) -> Any:
    pick = rng.random()
    if pick < 0.4:
        return rng.choice(TEXTS)
    if pick < 0.8 or depth > 12:
        return rng.choice(VALUES)
    inner = [mutated(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inner if rng.random() < 0.5 else {rng.choice(["id", "model", "concept", "a" * 500]): one for one in inner}


def body_of(rng: random.Random, fields: dict[str, tuple[str, ...]], starts: dict[str, Any]) -> bytes:
    """A body of `start` or of a call that takes an id, most of it right and some of it not.

    fields: kind → its options; those of an erasure otherwise.
    """
    if rng.random() < 0.1:
        return rng.choice(BODIES)
    kind = rng.choice(list(starts))
    options = list(fields.get(kind, fields["erase"]))
    named = {"against": "shapes"} if kind in ("evaluate", "attack") else {"model": "shapes"}
    sound: dict[str, Any] = {
        "options": {"concept": ["circle"], **named}, "model": "shapes", "deltas": ["run"], "strengths": [1.0],
        "delta": "run", "run": "run", "form": "lora", "rank": 4, "against": "run", "name": "x", "preview_every": 3,
        "prompt": "one red circle", "strength": 0.5, "seed": 1,
    }  # fmt: skip
    body = {"kind": kind, **{name: sound[name] for name in starts[kind].__annotations__ if name != "kind"}}
    if rng.random() < 0.3:
        body = {"id": rng.choice(TEXTS)}
    if rng.random() < 0.3:  # of the right type
        names = [name for name in body if name != "kind" and isinstance(body[name], str)]
        name = rng.choice(names or ["id"])
        body[name] = rng.choice(TEXTS)
    if "options" in body and rng.random() < 0.2:  # one option that is wrong, among sound ones
        body["options"][rng.choice([*named, *options])] = rng.choice(VALUES)
    for _ in range(rng.randrange(3)):
        inside = body.get("options") if rng.random() < 0.6 else body
        if isinstance(inside, dict):
            inside[rng.choice(options if inside is not body else [*body, "x"])] = mutated(rng)
    return json.dumps(body).encode("ascii")


def query_of(rng: random.Random) -> bytes:
    names = ["id", "run", "name", "model", "x"]
    pairs = [(rng.choice(names), rng.choice(TEXTS)[:5_000]) for _ in range(rng.randrange(4))]
    text = "&".join(f"{name}={quote(value, errors='surrogatepass')}" for name, value in pairs)
    return (text + rng.choice(["", "", "&", "=&==", "%", "%zz", "%00", "%ff"])).encode("ascii")


def headers_of(rng: random.Random, token: str) -> list[tuple[bytes, bytes]]:
    headers = [(b"host", rng.choice(HOSTS))]
    origin = rng.choice(ORIGINS)
    headers += [(b"origin", origin)] if origin is not None else []
    basic = base64.b64encode(rng.choice([b"ann:secret"] * 40 + [b"ann", b"\xff:", b":" * 9_000]))
    headers += rng.choice([[(b"authorization", b"Basic " + basic)]] * 40 + [
        [(b"x-salun-token", token.encode())], [(b"x-salun-token", b"\xff")], [(b"authorization", b"Basic \xff")],
        [(b"cookie", b";=;access-token=;" * 500)], [],
    ])  # fmt: skip
    headers += [(b"content-type", rng.choice([b"application/json"] * 30 + [b"", b"text/plain", b"\xff"]))]
    headers += rng.choice([[]] * 30 + [[(b"content-length", b"-1")], [(b"content-length", b"9" * 5_000)]])
    return headers + rng.choice([[]] * 30 + [[(b"sec-fetch-site", b"cross-site")], [(b"host", b"127.0.0.1:7870")]])


def request(app: Any, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> int:
    """The status of an answer. Raises SalunError for 4xx, and RuntimeError for 5xx, or for none at all."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": quote(path).encode(), "root_path": "", "query_string": query, "headers": headers,
        "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 7870),
    }  # fmt: skip
    parts = [body[at : at + 65_536] for at in range(0, len(body), 65_536)] or [b""]
    statuses: list[int] = []
    size = 0

    async def receive() -> Any:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        nonlocal size
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        size += len(message.get("body", b""))

    asyncio.run(app(scope, receive, send))
    if not statuses or statuses[0] >= 500:
        raise RuntimeError(f"{method} {path}?{query[:200]!r} {headers!r} {body[:300]!r}: {statuses}")
    if size > 2_000_000:
        raise RuntimeError(f"{method} {path}: an answer of {size:,} bytes")
    if statuses[0] >= 400:
        raise SalunError(str(statuses[0]))
    return statuses[0]


@contextmanager
def served(folder: Path) -> Iterator[tuple[Any, Service, Access]]:
    """The API as `salun ui` has it, without gradio; its jobs wait for ever."""
    import threading

    from starlette.applications import Starlette

    from extension.access import Access
    from extension.api import add_routes
    from extension.host import StandaloneHost
    from extension.jobs import Job
    from extension.service import Service

    at_work = threading.Event()

    class Waiting(StandaloneHost):
        @contextmanager
        def gpu_lease(self, job: Job) -> Iterator[None]:
            at_work.wait()
            yield

    service = Service(Waiting(folder / "data"))
    (service.runs.folder / "run").mkdir()
    record = {"status": "done", "options": {"concept": ["circle"], "model": "shapes"}}
    (service.runs.folder / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (service.runs.folder / "run" / "delta.salun.safetensors").touch()
    access = Access({"ann": "secret"}, guarded=True, signed_in=lambda cookies: "access-token=t" in cookies)
    app = Starlette()
    add_routes(app, service, access)
    try:
        yield front_of(app, access), service, access
    finally:
        for job in service.queue.all():
            service.queue.cancel(job.id)
        at_work.set()
        service.queue.close()


def front_of(app: Any, access: Access) -> Any:
    from extension.front import Front

    return Front(app, access)


def attack(folder: Path, numbers: range) -> Findings:
    """One mutated request a case; every hundredth, all jobs are cancelled and the status is asked for."""
    from extension.api import PREFIX
    from extension.bodies import STARTS
    from extension.inputs import ATTACK_FIELDS, ERASE_FIELDS, EVAL_FIELDS

    findings = Findings(folder)
    fields = {"erase": ERASE_FIELDS, "evaluate": EVAL_FIELDS, "attack": ATTACK_FIELDS}
    with served(folder) as (app, service, access):
        service.models.concepts(None)  # imports torch once, which takes seconds on a busy machine
        for number in numbers:
            rng = random.Random(number)
            route, method = rng.choice(["start"] * 8 + list(ROUTES)), ""
            method = ROUTES[route] if rng.random() < 0.95 else rng.choice(["PUT", "OPTIONS", "HEAD", "\xff"])
            path = f"{PREFIX}/{route}" if rng.random() < 0.95 else rng.choice(["/", "/login", "/config", "//", "/\0"])
            body = body_of(rng, fields, STARTS) if method != "GET" else b""
            call = sending(app, method, path, query_of(rng), headers_of(rng, access.token), body)
            findings.attempt(number, route, call)
            if number % 100 == 99:
                headers = [(b"host", b"127.0.0.1:7870"), (b"authorization", b"Basic YW5uOnNlY3JldA==")]
                findings.attempt(number, "poll", sending(app, "GET", f"{PREFIX}/status", b"", headers, b""))
                for job in service.queue.all():
                    service.queue.cancel(job.id)
    return findings


def sending(*given: Any) -> Callable[[], int]:
    return lambda: request(*given)


@pytest.mark.slow
def test_hostile_requests_are_answered(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed (the extra `ui`)")
    found = in_child("tests.test_campaign_api", tmp_path, CASES)
    accepted = sum(found["accepted"].values())
    assert CASES / 20 < accepted < CASES * 19 / 20, found["accepted"]
    assert found["accepted"]["poll"] == CASES // 100
    assert found["slowest"] < 2


def test_options_of_wrong_types_are_answered(tmp_path: Path) -> None:
    """Every option with every value, the others sound: `request` raises for an answer of 500 and above."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (the extra `ui`)")
    from extension.api import PREFIX
    from extension.inputs import ATTACK_FIELDS, ERASE_FIELDS, EVAL_FIELDS

    sound = {
        "erase": (ERASE_FIELDS, {"options": {"concept": ["circle"], "model": "shapes"}}),
        "evaluate": (EVAL_FIELDS, {"model": "shapes", "options": {"concept": ["circle"], "against": "shapes"}}),
        "attack": (ATTACK_FIELDS, {"model": "shapes", "options": {"concept": ["circle"], "against": "shapes"}}),
    }
    statuses: set[int] = set()
    headers = [(b"host", b"127.0.0.1:7870"), (b"authorization", b"Basic YW5uOnNlY3JldA==")]
    headers.append((b"content-type", b"application/json"))
    with served(tmp_path) as (app, service, _):
        for kind, option in [(kind, option) for kind, (fields, _) in sound.items() for option in fields]:
            for value in VALUES:
                _, given = sound[kind]
                wrong = {**given, "kind": kind, "options": {**given["options"], option: value}}
                body = json.dumps(wrong).encode("ascii")
                try:
                    statuses.add(request(app, "POST", f"{PREFIX}/start", b"", headers, body))
                except SalunError as error:
                    statuses.add(int(str(error)))
            for job in service.queue.all():
                service.queue.cancel(job.id)
    assert statuses == {200, 400, 404}
