"""Who may call the HTTP API: the page itself by its token, people by name and password, nobody from another site."""

from __future__ import annotations

import base64
import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OTHER_SITE = "requests from other sites are rejected"
BAD_HOST = "the Host header is no valid HOST or HOST:PORT: open the page by its address"
SIGNED_OUT = "nobody is signed in: load the page again and sign in"
BY_NAME = (
    "This page is open to everybody, so it answers under its address alone, such as 127.0.0.1 or 192.168.0.5: another "
    "site could make a name lead here. Open it by its address, or start the program with a password: "
    "--auth NAME:PASSWORD for salun ui, --gradio-auth NAME:PASSWORD for a WebUI."
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_-])?)(?::([0-9]{1,5}))?")


class Refused(Exception):
    """status: 400, 401, 403, 408 or 413. text: for the caller. challenge: whether a name and password would help."""

    def __init__(self, status: int, text: str, challenge: bool = False) -> None:
        super().__init__(text)
        self.status, self.text, self.challenge = status, text, challenge


@dataclass
class Access:
    """users: name → password; with any, requests without the page's token must have them (HTTP Basic).

    open: whether requests without the token are served at all. token: known to those who can open the
    page. guarded: whether opening the page takes a login. signed_in: whether the Cookie header is of a login that
    still holds; where the page is guarded, the token counts only together with one.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    open: bool = True
    closed_because: str = ""
    guarded: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    signed_in: Callable[[str], bool] = lambda cookies: False

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Refused for an API request with these headers, as `headers_of` gives them."""
        check_origin(headers)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, OTHER_SITE)
        token = headers.get("x-salun-token")
        if not (self.users if token is None else self.guarded):  # anybody can get as far as this
            check_address(headers)
        if token is not None:
            if not _equal(token, self.token):
                raise Refused(401, "the page is of an earlier start of the program: load it again")
            if self.guarded and not self.signed_in(headers.get("cookie", "")):
                raise Refused(401, SIGNED_OUT)
            return
        if not self.open:
            raise Refused(403, self.closed_because)
        if self.users and not self.known(headers):
            raise Refused(401, "name and password are needed", challenge=True)

    def known(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has the name and password of a user (HTTP Basic)."""
        name, password = _basic(headers.get("authorization", ""))
        expected = self.users.get(name)
        return _equal(password, expected if expected is not None else secrets.token_hex(8)) and expected is not None


def headers_of(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of an ASGI scope, names in lower case; one that is given twice has both values, which is invalid."""
    found: dict[str, str] = {}
    for key, value in raw:
        name, text = key.decode("latin-1").lower(), value.decode("latin-1")
        found[name] = f"{found[name]}, {text}" if name in found else text
    return found


def gradio_login(app: Any) -> Callable[[str], bool]:
    """Whether a Cookie header is of somebody signed in to a gradio application: all its versions name their cookies
    `access-token…` and keep what these hold in `tokens` until the logout."""

    def signed_in(cookies: str) -> bool:
        pairs = [pair.strip().partition("=") for pair in cookies.split(";")]
        return any(name.startswith("access-token") and value in app.tokens for name, _, value in pairs)

    return signed_in


def check_origin(headers: Mapping[str, str]) -> None:
    """Raises Refused for an invalid Host header, and for a page of another origin.

    What a proxy adds (X-Forwarded-Host and the like) is not consulted: it must pass the Host header on.
    """
    host = headers.get("host", "")
    _host_name(host)
    origin = headers.get("origin")
    if origin is not None and origin.casefold() not in (f"http://{host}".casefold(), f"https://{host}".casefold()):
        raise Refused(403, OTHER_SITE)


def check_address(headers: Mapping[str, str]) -> None:
    """Raises Refused for a request under a name: a domain can be made to lead to this machine (DNS rebinding). The name
    under which a proxy was called counts as well."""
    for header in ("host", "x-forwarded-host"):
        if header in headers and not _is_address(_host_name(headers[header])):
            raise Refused(403, BY_NAME)


def _host_name(host: str) -> str:
    """A Host header without its port. Raises Refused for one that is invalid, such as a name that ends in a dot."""
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match[2] or 80) < 65536:
        raise Refused(400, BAD_HOST)
    return match[1]


def _is_address(name: str) -> bool:
    try:
        ipaddress.IPv6Address(name[1:-1]) if name.startswith("[") else ipaddress.IPv4Address(name)
    except ValueError:
        return name.casefold() == "localhost"
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


def _equal(first: str, second: str) -> bool:
    return secrets.compare_digest(first.encode("utf-8"), second.encode("utf-8"))
