"""A service under uvicorn in a thread, and clients that speak to its socket byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import uvicorn
from serve_cases import wait_until
from serve_process import free_port

from blendserve.serve import server
from blendserve.serve.app import make_app
from blendserve.serve.service import Service


@contextmanager
def listening(service: Service) -> Iterator[int]:
    """The port of a running service."""
    port, app = free_port(), make_app(service)
    config = uvicorn.Config(
        app, port=port, http=server.protocol_of(app), log_level="critical", ws="none", timeout_keep_alive=60
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    yield port
    running.should_exit = True
    thread.join(10)


def exchange(port: int, data: bytes, silence_s: float = 3.0) -> bytes:
    """Send bytes, and read until the service closes the connection or stays silent."""
    with closing(socket.create_connection(("127.0.0.1", port), 5)) as client:
        client.sendall(data)
        client.settimeout(silence_s)
        found = b""
        with suppress(TimeoutError, ConnectionError):
            while part := client.recv(65536):
                found += part
        return found
