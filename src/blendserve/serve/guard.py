"""Who may come in: API keys, sessions of the dashboard, and which pages of other sites may not.

Without keys only this machine is let in, under a name of its own: a page of another site that a browser was tricked
to send here carries another Host or Origin.
"""

from __future__ import annotations

import ipaddress
import secrets
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blendserve.serve.caller import Caller
from blendserve.serve.failures import ApiError
from blendserve.serve.http import error_response, request_id
from blendserve.serve.keys import ApiKey
from blendserve.serve.service import Service

COOKIE = "blendserve_session"
_OPEN_PREFIXES = ("/health", "/static/", "/login")
_MAX_SESSIONS = 10_000
_SAFE = ("GET", "HEAD", "OPTIONS")


class Sessions:
    """Browsers that have shown a key. They are forgotten when the service stops."""

    def __init__(self) -> None:
        self._key_ids: dict[str, str] = {}

    def begin(self, key: ApiKey) -> str:
        if len(self._key_ids) >= _MAX_SESSIONS:
            self._key_ids.pop(next(iter(self._key_ids)))
        name = secrets.token_urlsafe(32)
        self._key_ids[name] = key.id
        return name

    def end(self, name: str) -> None:
        self._key_ids.pop(name, None)

    def key_id(self, name: str) -> str | None:
        return self._key_ids.get(name)


class Guard:
    """ASGI middleware that names the caller of every request, or refuses it."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        id = request_id()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            scope["caller"] = self._gate.caller(scope)
        except ApiError as error:
            if error.status_code == 401 and _wants_page(scope):
                from starlette.responses import RedirectResponse

                return await RedirectResponse("/login", 303)(scope, receive, send_named)
            return await error_response(error)(scope, receive, send_named)
        await self._app(scope, receive, send_named)
        return None


class Gate:
    """Knows callers by what they send."""

    def __init__(self, service: Service, sessions: Sessions) -> None:
        self._service = service
        self._sessions = sessions

    def caller(self, scope: Scope) -> Caller:
        """Raises: ApiError for whom nobody knows."""
        headers, path = Headers(scope=scope), scope["path"]
        keys = self._service.keys.keys()
        if not keys:
            self._check_local(scope, headers)
            return Caller()
        if path.startswith(_OPEN_PREFIXES):
            if scope["method"] not in _SAFE:
                _check_origin(headers)
            return Caller()
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secret:
            key = self._service.keys.find(secret.strip())
        else:
            key = self._of_session(scope, headers, keys)
        if key is None:
            raise ApiError(
                401,
                "No valid API key: send it as Authorization: Bearer KEY. `blendserve keys add` makes one.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller(key)

    def _of_session(self, scope: Scope, headers: Headers, keys: tuple[ApiKey, ...]) -> ApiKey | None:
        name = cookie_of(headers)
        id = None if name is None else self._sessions.key_id(name)
        if id is not None and scope["method"] not in _SAFE:
            _check_origin(headers)
        return next((key for key in keys if key.id == id), None)

    def _check_local(self, scope: Scope, headers: Headers) -> None:
        """Raises: ApiError for what did not come from this machine to this machine."""
        if not self._service.settings.is_local:
            raise ApiError(
                401, "This service has no keys yet; make one with `blendserve keys add`.", code="invalid_api_key"
            )
        if not _is_local_name(headers.get("host", "")):
            raise ApiError(403, "Without keys this service answers only to localhost.", code="host_not_allowed")
        if scope["method"] not in _SAFE:
            _check_origin(headers)


def cookie_of(headers: Headers) -> str | None:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def _check_origin(headers: Headers) -> None:
    """Raises: ApiError for a request that a page of another site made."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(403, "Pages of other sites may not use this service.", code="origin_not_allowed")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "Pages of other sites may not use this service.", code="origin_not_allowed")


@lru_cache(maxsize=256)
def _is_local_name(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name in ("localhost",) or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _wants_page(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return scope["method"] == "GET" and "text/html" in headers.get("accept", "")
