"""Runs the application under uvicorn, with limits on what a connection may hold up."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from blendserve.errors import ConfigError
from blendserve.serve.app import make_app
from blendserve.serve.polls import Polls
from blendserve.serve.service import Service
from blendserve.serve.settings import ServeSettings

HEADER_S = 20.0
"""A client has so long to send the head of a request."""
MAX_CONNECTIONS = 2000
_RENEWAL_S = 5.0
"""A connection that polls may be closed so much earlier than its time, which spares a timer for each poll."""


class _Patient(H11Protocol):
    """HTTP/1.1 that closes a connection whose next request does not begin, or whose head does not end, in time, and
    that answers `polls` at once.
    """

    polls: Polls
    _timer: asyncio.TimerHandle | None = None
    _renewed_s = 0.0
    _counted_cycle: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            reply = self.polls.answer(data, self.server_state.default_headers)
            if reply is not None:
                return self._reply(reply)
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        super().data_received(data)
        if self.cycle is not self._counted_cycle:
            self._counted_cycle = self.cycle
            self._stop_timer()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        """Is nothing under way, so that the next bytes begin a request?"""
        return (
            (self.cycle is None or self.cycle.response_complete)
            and self.conn.their_state is h11.IDLE
            and not self.conn.trailing_data[0]
            and not self.flow.write_paused
            and len(self.connections) < MAX_CONNECTIONS
        )

    def _reply(self, reply: bytes) -> None:
        self._stop_timer()
        self.server_state.total_requests += 1
        self.transport.write(reply)
        now_s = self.loop.time()
        if self.timeout_keep_alive_task is None or now_s > self._renewed_s + _RENEWAL_S:
            self._unset_keepalive_if_required()
            self._renewed_s = now_s
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEADER_S, self._close_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        self.transport.close()


def protocol_of(app: Starlette) -> type[_Patient]:
    """The protocol of an application's connections."""
    return type("_PatientOfApp", (_Patient,), {"polls": Polls(app.state.service, app.state.gate)})


def check_reachable(service: Service) -> None:
    """Raises: ConfigError for an address that others reach, without a key."""
    settings = service.settings
    if not settings.is_local and not service.keys.keys():
        raise ConfigError(
            f"--host {settings.host} can be reached by others, and there is no key; make one first: blendserve keys "
            f"add NAME --data {settings.data}"
        )


def quiet_parser() -> None:
    """Keep the form parser from writing every broken form of a client to the log."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class _Server(uvicorn.Server):
    """Says when it listens, and ends when its service can never work."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening
        self.reason: str | None = None

    def give_up(self, reason: str) -> None:
        self.reason, self.should_exit = reason, True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()


def serve(settings: ServeSettings, listening: Callable[[], None] = lambda: None) -> int:
    """Run a service until a signal ends it; `listening` is called when clients may come.

    Raises: ConfigError when it cannot be started.
    """
    quiet_parser()
    service = Service(settings)
    try:
        check_reachable(service)
        app = make_app(service)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=protocol_of(app),
            ws="none",
            access_log=False,
            log_level=logging.WARNING,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=3,
            ssl_certfile=None if settings.certificate is None else os.fspath(settings.certificate),
            ssl_keyfile=None if settings.private_key is None else os.fspath(settings.private_key),
        )
        config.load()
    except BaseException:
        service.close()
        raise
    server = _Server(config, listening)
    service.on_hopeless = server.give_up
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    except SystemExit as end:  # uvicorn's word for an address that is taken
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}; stop what does, or give another --port"
        ) from end
    if server.reason is not None:
        raise ConfigError(server.reason)
    return 0
