"""Request bodies as untrusted input: limits of size and time, and checks of their JSON values."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from .access import Rejected

LARGEST = 1_000_000  # bytes of a body
SECONDS = 30.0  # until a body must have arrived
DEEPEST = 8  # levels of nested lists and objects
LARGEST_INTEGER = 2**63


async def read_body(receive: Any, headers: Mapping[str, str], limit: int, seconds: float = SECONDS) -> bytes:
    """The body of an ASGI request. Raises Rejected for a body that is too large or too slow."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > limit:
        raise Rejected(413, f"the request has a body of {length[:20]} bytes; the limit is {limit:,}. Send less.")
    try:
        return await asyncio.wait_for(_read(receive, limit), seconds)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise Rejected(408, f"the request's body did not arrive within {seconds:g} s: send it again") from error


async def _read(receive: Any, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Rejected(400, "the connection closed before the request's body was complete")
        body += message.get("body", b"")
        if len(body) > limit:
            raise Rejected(413, f"the request's body is larger than the limit of {limit:,} bytes: send less")
        if not message.get("more_body", False):
            return bytes(body)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds; an empty body is an empty object. Raises Rejected for any other value."""
    try:
        content = json.loads(body or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Rejected(400, f"the request is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise Rejected(400, f"the request must be a JSON object, not {type(content).__name__}")
    _check_values(content)
    return content


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _check_values(value: Any, depth: int = 1) -> None:
    """Raises Rejected for values that files or JSON cannot represent."""
    if depth > DEEPEST:
        raise Rejected(400, f"the request is nested deeper than {DEEPEST} levels")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(name, depth)
            _check_values(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, depth + 1)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise Rejected(400, "the request holds text with NUL or an unpaired surrogate")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise Rejected(400, f"the request holds a number of {len(str(value))} digits: send a smaller one")
