"""Who may call the HTTP API: the page by its token, users by name and password, no other site."""

from __future__ import annotations

import base64
import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OTHER_SITE = "requests from other sites are rejected"
BAD_HOST = "the Host header is not a valid HOST or HOST:PORT: open the page by its address"
SIGNED_OUT = "nobody is signed in: load the page again and sign in"
BY_NAME = (
    "This page has no password, so it responds only under its address, such as 127.0.0.1 or 192.168.0.5: another site "
    "could make a domain name point here. Open the page by its address, or start the program with a password: "
    "--auth NAME:PASSWORD for salun ui, --gradio-auth NAME:PASSWORD for a WebUI."
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_-])?)(?::([0-9]{1,5}))?")


class Rejected(Exception):
    """A rejected request. status: HTTP status code. text: for the caller. challenge: whether a login would help."""

    def __init__(self, status: int, text: str, challenge: bool = False) -> None:
        super().__init__(text)
        self.status, self.text, self.challenge = status, text, challenge


@dataclass
class Access:
    """The rules of access.

    users: name → password; if there are any, requests without the page's token need one of them (HTTP Basic). open:
    whether requests without the token are served at all; closed_because: the message if not. token: known to those who
    can open the page. guarded: whether the page needs a login. signed_in: whether a Cookie header belongs to a valid
    login; on a guarded page the token counts only together with one.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    open: bool = True
    closed_because: str = ""
    guarded: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    signed_in: Callable[[str], bool] = lambda cookies: False

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Rejected for an API request with these headers, as `headers_of` gives them."""
        check_origin(headers)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Rejected(403, OTHER_SITE)
        token = headers.get("x-salun-token")
        if not (self.users if token is None else self.guarded):  # without a login
            check_address(headers)
        if token is not None:
            if not _equal(token, self.token):
                raise Rejected(401, "the program was restarted after this page was loaded: load it again")
            if self.guarded and not self.signed_in(headers.get("cookie", "")):
                raise Rejected(401, SIGNED_OUT)
            return
        if not self.open:
            raise Rejected(403, self.closed_because)
        if self.users and not self.known(headers):
            raise Rejected(401, "name and password are needed", challenge=True)

    def known(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has the name and password of a user (HTTP Basic)."""
        name, password = _basic(headers.get("authorization", ""))
        expected = self.users.get(name)
        return _equal(password, expected if expected is not None else secrets.token_hex(8)) and expected is not None


def headers_of(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of an ASGI scope, names in lower case; a repeated header has both values, which is invalid."""
    headers: dict[str, str] = {}
    for key, value in raw:
        name, text = key.decode("latin-1").lower(), value.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


def gradio_login(app: Any) -> Callable[[str], bool]:
    """Returns a function: whether a Cookie header is from a valid login to a gradio application, all of whose versions
    name their cookies `access-token…` and keep the values in `tokens` until the logout."""

    def signed_in(cookies: str) -> bool:
        pairs = [pair.strip().partition("=") for pair in cookies.split(";")]
        return any(name.startswith("access-token") and value in app.tokens for name, _, value in pairs)

    return signed_in


def check_origin(headers: Mapping[str, str]) -> None:
    """Raises Rejected for an invalid Host header, and for a page of another origin.

    Headers of a proxy (X-Forwarded-Host) are not used: the proxy must forward the Host header.
    """
    host = headers.get("host", "")
    _host_name(host)
    origin = headers.get("origin")
    if origin is not None and origin.casefold() not in (f"http://{host}".casefold(), f"https://{host}".casefold()):
        raise Rejected(403, OTHER_SITE)


def check_address(headers: Mapping[str, str]) -> None:
    """Raises Rejected for a request under a domain name, which can be made to point to this machine (DNS rebinding).
    The name under which a proxy was called counts as well.
    """
    for header in ("host", "x-forwarded-host"):
        if header in headers and not _is_address(_host_name(headers[header])):
            raise Rejected(403, BY_NAME)


def _host_name(host: str) -> str:
    """A Host header without its port. Raises Rejected if it is invalid, such as a name that ends in a dot."""
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match[2] or 80) < 65536:
        raise Rejected(400, BAD_HOST)
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
