"""Who may call the HTTP API: the page itself by its token, people by name and password, nobody from another site."""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OTHER_SITE = "requests from other sites are refused"
BY_NAME = (
    "This page is open to everybody, so it answers under its address alone, such as 127.0.0.1 or 192.168.0.5: another "
    "site could make a name lead here. Open it by its address, or start the program with a password: "
    "--auth NAME:PASSWORD for salun ui, --gradio-auth NAME:PASSWORD for a WebUI."
)


class Refused(Exception):
    """status: 401 or 403. text: for the caller. challenge: whether a name and password would help."""

    def __init__(self, status: int, text: str, challenge: bool = False) -> None:
        super().__init__(text)
        self.status, self.text, self.challenge = status, text, challenge


@dataclass(frozen=True)
class Access:
    """users: name → password; with any, requests without the page's token must bear them (HTTP Basic).

    open: whether requests without the token are served at all. token: known to those who can open the
    page. guarded: whether opening the page takes a name and a password.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    open: bool = True
    closed_because: str = ""
    guarded: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Refused for a request with these headers (names in lower case)."""
        _same_origin(headers)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, OTHER_SITE)
        token = headers.get("x-salun-token")
        if not (self.users if token is None else self.guarded):  # anybody can get as far as this
            _by_address(headers)
        if token is not None:
            if not _equal(token, self.token):
                raise Refused(401, "the page is of an earlier start of the program: load it again")
            return
        if not self.open:
            raise Refused(403, self.closed_because)
        if self.users:
            name, password = _basic(headers.get("authorization", ""))
            known = self.users.get(name)
            if not _equal(password, known if known is not None else secrets.token_hex(8)) or known is None:
                raise Refused(401, "name and password are needed", challenge=True)


class AtHome:
    """Around a whole ASGI application that asks for no password: it answers nobody under a name that others may own,
    and nothing that a page of another site asks for. A link that leads here is followed.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                _same_origin(headers)
                _by_address(headers)
            except Refused as error:
                await _refuse(scope["type"], error, send)
                return
        await self.app(scope, receive, send)


async def _refuse(kind: str, error: Refused, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    told = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": error.status, "headers": told})
    await send({"type": "http.response.body", "body": error.text.encode("utf-8")})


def _same_origin(headers: Mapping[str, str]) -> None:
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None and origin.split("://")[-1].casefold() != host.casefold():
        raise Refused(403, OTHER_SITE)


def _by_address(headers: Mapping[str, str]) -> None:
    if not _is_address(headers.get("host", "")):
        raise Refused(403, BY_NAME)


def _is_address(host: str) -> bool:
    """Whether a Host header names no domain: a domain can be made to lead to this machine (DNS rebinding)."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.casefold() in ("localhost", "")
    return True


def _basic(header: str) -> tuple[str, str]:
    kind, _, value = header.partition(" ")
    if kind.casefold() != "basic":
        return "", ""
    try:
        name, _, password = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")
    except ValueError:
        return "", ""
    return name, password


def _equal(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode("utf-8"), other.encode("utf-8"))
