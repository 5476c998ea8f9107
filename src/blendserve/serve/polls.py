"""Polls of one batch, answered before the ordinary way through HTTP and the application begins.

Clients that wait are most of what a busy service hears, and each costs the engine time on the cores that they share.
Only a request that comes whole, alone and in a plain form is taken; it gets the same answer as the ordinary way gives.
Everything else, errors included, goes that way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from blendserve.serve.caller import Caller
from blendserve.serve.failures import ApiError
from blendserve.serve.guard import Gate
from blendserve.serve.http import request_id
from blendserve.serve.keys import ApiKey
from blendserve.serve.service import Service

_BEGIN = b"GET /v1/batches/batch_"
_ID = slice(16, 54)
_POLL = re.compile(
    rb"GET (/v1/batches/batch_[0-9a-f]{32}) HTTP/1\.1\r\n((?:[A-Za-z0-9_-]+:[\x20-\x7e]*\r\n){1,40})\r\n"
)
_MAX_BYTES = 8192
_MAX_REMEMBERED = 1024
_PLAIN = frozenset((b"host", b"user-agent", b"accept", b"accept-encoding", b"authorization", b"content-type"))
_IGNORED_PREFIXES = (b"x-stainless-", b"openai-")
"""Headers beside those that mean nothing here; a request with any other goes the ordinary way."""


class Polls:
    """Answers polls of a running service. Clients send the same words behind the id again and again: who was let in
    with them is remembered until keys change.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate
        self._keys: tuple[ApiKey, ...] = ()
        self._callers: dict[bytes, Caller] = {}
        self._default_headers: Iterable[tuple[bytes, bytes]] = ()
        self._head = b""

    def answer(self, data: bytes, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The whole answer to what a connection sent; None where the ordinary way must answer."""
        if not data.startswith(_BEGIN):
            return None
        caller = self._remembered(data[_ID.stop :]) or self._let_in(data)
        if caller is None:
            return None
        batch = self._service.batches.find(caller, data[_ID].decode("latin-1"))
        if batch is None:
            return None
        body = self._service.poll_bodies.body(batch)
        return b"%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b" % (
            self._named(default_headers),
            len(body),
            request_id().encode(),
            body,
        )

    def _remembered(self, words: bytes) -> Caller | None:
        keys = self._service.keys.keys()
        if keys is not self._keys:
            self._keys = keys
            self._callers.clear()
        return self._callers.get(words)

    def _let_in(self, data: bytes) -> Caller | None:
        """Who sends a plain poll; None for any other request, or where nobody is let in."""
        found = _POLL.fullmatch(data) if len(data) <= _MAX_BYTES else None
        headers = None if found is None else _plain_headers(found[2])
        if found is None or headers is None:
            return None
        try:
            caller = self._gate.caller(_scope(found[1].decode(), headers))
        except ApiError:
            return None
        if len(self._callers) >= _MAX_REMEMBERED:
            self._callers.clear()
        self._callers[data[_ID.stop :]] = caller
        return caller

    def _named(self, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The head up to what each answer has of its own. uvicorn makes new default headers every second."""
        if default_headers is not self._default_headers or not self._head:
            named = b"".join(b"%b: %b\r\n" % header for header in default_headers)
            self._default_headers = default_headers
            self._head = (
                b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\nx-content-type-options: nosniff\r\n" % named
            )
        return self._head


def _plain_headers(lines: bytes) -> list[tuple[bytes, bytes]] | None:
    """Headers of a request that has no body and asks for nothing special; None for another one."""
    headers: dict[bytes, bytes] = {}
    for line in lines[:-2].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip()
        is_plain = name in _PLAIN or name.startswith(_IGNORED_PREFIXES)
        if not is_plain and not (name == b"connection" and value == b"keep-alive"):
            return None
        if name in headers:
            return None
        headers[name] = value
    return list(headers.items()) if b"host" in headers else None


def _scope(path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": headers}
