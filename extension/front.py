"""Checks on every request to `salun ui`, gradio's routes too: its origin, the size and time of its body, frames."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from .access import OTHER_SITE, SIGNED_OUT, Access, Rejected, check_address, check_origin, headers_of
from .body import LARGEST, SECONDS, read_body
from .limits import MAX_CONNECTIONS

BEFORE_LOGIN = 16_000  # bytes of a body before the login
SECONDS_BEFORE_LOGIN = 3.0  # until such a body must have arrived
PUBLIC = ("/salun/v1/", "/assets/", "/static/", "/svelte/", "/_app/")  # the API checks access itself; others are files
OPENING = ("/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon")  # files of the login page
OWN_HEADERS = {
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
NO_FRAMES = (
    b"content-security-policy",
    b"frame-ancestors 'none'",
)  # in addition to a policy that the response already has


class Front:
    """An ASGI application that passes only requests of this origin, with complete bodies, to another application.

    On a guarded page, only the login page is served before the login.
    """

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access
        self._reading: dict[asyncio.Task[bytes], None] = {}  # bodies before the login, oldest first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = headers_of(scope["headers"])
        answer = _with_own_headers(send, scope.get("scheme") == "https")
        try:
            limit = self._admit(scope, headers)
            if scope["type"] == "http":
                read = self._read_before_login if limit == BEFORE_LOGIN else _read
                receive = _after(await read(receive, headers), receive)
        except Rejected as error:
            await _reject(scope["type"], error, answer)
            return
        await self.app(scope, receive, answer)

    async def _read_before_login(self, receive: Any, headers: Mapping[str, str]) -> bytes:
        """A body before the login. At most a quarter of the connections wait for one: a further request ends the oldest
        wait, so that incomplete bodies cannot prevent a login. Raises Rejected."""
        while len(self._reading) >= MAX_CONNECTIONS // 4:
            oldest = next(iter(self._reading))
            del self._reading[oldest]
            oldest.cancel()
        reading = asyncio.ensure_future(read_body(receive, headers, BEFORE_LOGIN, SECONDS_BEFORE_LOGIN))
        self._reading[reading] = None
        try:
            return await reading
        except asyncio.CancelledError:
            if reading in self._reading:  # this request itself was cancelled
                raise
            raise Rejected(
                408, "the request's body did not arrive in time, and others are waiting: send it again"
            ) from None
        finally:
            self._reading.pop(reading, None)

    def _admit(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> int:
        """The maximum size of a request's body in bytes. Raises Rejected for a request that is not allowed."""
        check_origin(headers)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_link(scope, headers):
            raise Rejected(403, OTHER_SITE)
        if not self.access.guarded:
            check_address(headers)
            return LARGEST
        path, method = scope["path"], scope.get("method")
        if self.access.signed_in(headers.get("cookie", "")):
            return LARGEST
        if path.startswith(PUBLIC[0]):
            return LARGEST if self.access.known(headers) else BEFORE_LOGIN
        if method in ("GET", "HEAD") and (path in OPENING or path.startswith(PUBLIC)):
            return BEFORE_LOGIN
        if method == "POST" and path.rstrip("/") == "/login":
            return BEFORE_LOGIN
        raise Rejected(401, SIGNED_OUT)


async def _read(receive: Any, headers: Mapping[str, str]) -> bytes:
    return await read_body(receive, headers, LARGEST, SECONDS)


def _is_link(scope: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether a request follows another site's link to the page, which only shows the page."""
    opened = headers.get("sec-fetch-mode", "navigate") == "navigate"
    document = headers.get("sec-fetch-dest", "document") == "document"  # no frame
    return scope.get("method") in ("GET", "HEAD") and scope["path"] == "/" and opened and document


def _after(body: bytes, receive: Any) -> Any:
    """A `receive` that returns the body that was already read, then later messages."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_own_headers(send: Any, secure: bool) -> Any:
    """A `send` with headers that forbid other origins to read and other sites to frame the responses."""

    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (name, _strict(value, secure) if name.lower() == b"set-cookie" else value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(b"access-control-") and name.lower() not in OWN_HEADERS
            ]
            message = {**message, "headers": [*headers, *OWN_HEADERS.items(), NO_FRAMES]}
        await send(message)

    return answer


def _strict(cookie: bytes, secure: bool) -> bytes:
    """A Set-Cookie header's value with `SameSite=Strict`; gradio sets `SameSite=none`."""
    parts = [part.strip() for part in cookie.split(b";")]
    attributes = [part for part in parts if not part.lower().startswith(b"samesite")]
    if secure and b"secure" not in [part.lower() for part in attributes]:
        attributes.append(b"Secure")
    return b"; ".join([*attributes, b"SameSite=Strict"])


async def _reject(kind: str, error: Rejected, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"error": error.text}, ensure_ascii=False).encode("utf-8")
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
