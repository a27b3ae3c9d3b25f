"""HTTP connections of `salun ui`, with a time limit for the head of a request."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import MAX_CONNECTIONS

HEAD_SECONDS = 10.0  # until a request's head must be there in full; uvicorn itself waits without end
PER_ADDRESS = MAX_CONNECTIONS // 4  # of one address; a proxy on this machine has them all
_connected: Counter[str] = Counter()  # address → its connections


def _remote_address(transport: Any) -> str | None:
    """The address of the other side; None for this machine, where everybody behind a proxy has the same."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return None
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None) or address
    return None if mapped.is_loopback else str(mapped)


class OncePerMinute(logging.Filter):
    """Lets one of uvicorn's warnings about too many connections through a minute; each rejected request causes one."""

    _last = -60.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != "Exceeded concurrency limit.":
            return True
        now = time.monotonic()
        if now - self._last < 60:
            return False
        self._last = now
        return True


class Connection(H11Protocol):
    """uvicorn's protocol, closed where a request's head stays incomplete, or an address has too many connections.

    `front` limits the time for bodies.
    """

    _waiting: asyncio.TimerHandle | None = None
    _address: str | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = _remote_address(transport)
        if self._address is not None:
            _connected[self._address] += 1
            if _connected[self._address] > PER_ADDRESS:
                transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._address is not None:
            _connected[self._address] -= 1
            if not _connected[self._address]:
                del _connected[self._address]
        if self._waiting is not None:
            self._waiting.cancel()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)
