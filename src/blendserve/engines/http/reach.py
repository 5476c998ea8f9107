"""Whether anything listens where a server should be, before work is handed to others that will talk to it."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

_TIMEOUT_S = 3.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


def why_unreachable(base_url: str) -> str | None:
    """Why no connection can be made from here; None where one can, which is closed at once."""
    parts = urlsplit(base_url)
    try:
        socket.create_connection((parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme]), _TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error) or "no answer"
    return None
