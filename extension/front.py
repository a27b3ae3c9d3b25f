"""Checks on every request to `salun ui`, gradio's routes too: its origin, the size and time of its body, frames."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from .access import OTHER_SITE, SIGNED_OUT, Access, Refused, check_address, check_origin, headers_of
from .body import LARGEST, SECONDS, read_body
from .limits import MAX_CONNECTIONS

BEFORE_LOGIN = 16_000  # bytes of a body by somebody who is not signed in
SECONDS_BEFORE_LOGIN = 3.0  # until such a body must be there
PUBLIC = ("/salun/v1/", "/assets/", "/static/", "/svelte/", "/_app/")  # the API asks by itself; the rest are files
OPENING = ("/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon")  # what a login page is of
OWN_HEADERS = {
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
NO_FRAMES = (
    b"content-security-policy",
    b"frame-ancestors 'none'",
)  # in addition to a policy that an answer has already


class Front:
    """An ASGI application around another, which gets the requests of this origin alone, their bodies whole.

    Where the page is guarded, nothing but the login page reaches it before the login.
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
        except Refused as error:
            await _refuse(scope["type"], error, answer)
            return
        await self.app(scope, receive, answer)

    async def _read_before_login(self, receive: Any, headers: Mapping[str, str]) -> bytes:
        """A body by somebody who is not signed in. At most a quarter of the connections wait for one: a further request
        ends the wait of the oldest, so that half-sent bodies keep nobody from signing in. Raises Refused."""
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
            raise Refused(408, "the request's body was not there before too many others came: send it again") from None
        finally:
            self._reading.pop(reading, None)

    def _admit(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> int:
        """How many bytes of body a request may have. Raises Refused for one that is not let in."""
        check_origin(headers)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_link(scope, headers):
            raise Refused(403, OTHER_SITE)
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
        raise Refused(401, SIGNED_OUT)


async def _read(receive: Any, headers: Mapping[str, str]) -> bytes:
    return await read_body(receive, headers, LARGEST, SECONDS)


def _is_link(scope: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether a request follows a link on another site to the page: it shows the page and starts nothing."""
    opened = headers.get("sec-fetch-mode", "navigate") == "navigate"
    document = headers.get("sec-fetch-dest", "document") == "document"  # no frame
    return scope.get("method") in ("GET", "HEAD") and scope["path"] == "/" and opened and document


def _after(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body that was read already, then what comes after it."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_own_headers(send: Any, secure: bool) -> Any:
    """A `send` whose answers no other origin may read, and no other site may frame."""

    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, _strict(value, secure) if name.lower() == b"set-cookie" else value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(b"access-control-") and name.lower() not in OWN_HEADERS
            ]
            message = {**message, "headers": [*kept, *OWN_HEADERS.items(), NO_FRAMES]}
        await send(message)

    return answer


def _strict(cookie: bytes, secure: bool) -> bytes:
    """A Set-Cookie header's value for requests of this site alone; gradio's own says `SameSite=none`."""
    parts = [part.strip() for part in cookie.split(b";")]
    kept = [part for part in parts if not part.lower().startswith(b"samesite")]
    if secure and b"secure" not in [part.lower() for part in kept]:
        kept.append(b"Secure")
    return b"; ".join([*kept, b"SameSite=Strict"])


async def _refuse(kind: str, error: Refused, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"error": error.text}, ensure_ascii=False).encode("utf-8")
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
