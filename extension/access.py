"""Who may call the HTTP API: the page itself by its token, people by name and password, nobody from another site."""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field


class Refused(Exception):
    """status: 401 or 403. text: for the caller. challenge: whether a name and password would help."""

    def __init__(self, status: int, text: str, challenge: bool = False) -> None:
        super().__init__(text)
        self.status, self.text, self.challenge = status, text, challenge


@dataclass(frozen=True)
class Access:
    """users: name → password; with any, requests without the page's token must bear them (HTTP Basic).

    open: whether requests without the token are served at all. token: known to those who can open the
    page, which the host's own login guards.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    open: bool = True
    closed_because: str = ""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Refused for a request with these headers (names in lower case)."""
        self._same_origin(headers)
        if not self.users and not _is_address(headers.get("host", "")):
            raise Refused(403, "call this by its address, or set a password: another site's name may lead here")
        token = headers.get("x-salun-token")
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

    @staticmethod
    def _same_origin(headers: Mapping[str, str]) -> None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin.split("://")[-1].casefold() != host.casefold():
            raise Refused(403, "requests from other sites are refused")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "requests from other sites are refused")


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
