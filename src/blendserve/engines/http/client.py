"""One POST to an OpenAI-compatible server: what came back, or how it failed. Retrying is the caller's.

Credentials go to the one server that the user named: redirects are not followed, TLS is verified, and whatever a server
says is cleared of secrets before anyone else sees it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.bodies import json_of, text_of
from blendserve.engines.http.credentials import Credentials
from blendserve.errors import ConfigError

CONNECT_TIMEOUT_S = 30.0
MAX_RESPONSE_BYTES = 64 << 20
POOL_CONNECTIONS = 32
"""A pool of the library looks at all its connections for every request: many small pools stay quick."""


_REASONS = (
    (httpx2.ConnectTimeout, f"the server did not answer within {CONNECT_TIMEOUT_S:g} s"),
    (httpx2.ReadError, "the server closed it before its answer was whole"),
    (httpx2.WriteError, "the server closed it while the request was sent"),
    (httpx2.RemoteProtocolError, "the server does not speak HTTP"),
    (httpx2.ConnectError, "the server refused it"),
)
"""Of errors that say nothing themselves."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response, secrets taken out. Header names are in lower case."""

    status_code: int
    headers: Mapping[str, str]
    text: str
    credentials: Credentials = field(default_factory=Credentials)

    def json(self) -> Any:
        """The text decoded, and cleared of secrets again: JSON may have held them in escapes. Raises: as `json_of`."""
        value = json_of(self.text)
        return _redacted(value, self.credentials) if self.credentials.has_secret else value


class NoReplyError(Exception):
    """There was no whole response. `is_unreachable`: the request never left, so it is not to blame; `is_fatal`: trying
    again would not help any request.
    """

    def __init__(self, message: str, *, code: str, is_unreachable: bool = False, is_fatal: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_unreachable = is_unreachable
        self.is_fatal = is_fatal


class HttpClient:
    """Connections to one server, kept alive between requests. `timeout_s` is for one whole exchange, however slowly its
    bytes trickle. Raises: ConfigError when the environment names a proxy or certificates that cannot be used.
    """

    def __init__(
        self,
        address: ServerAddress,
        credentials: Credentials,
        *,
        timeout_s: float,
        max_connections: int,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._max_response_bytes = max_response_bytes
        self._stack = AsyncExitStack()
        self._num_open = [0] * -(-max_connections // POOL_CONNECTIONS)
        try:
            self.ssl_context = httpx2.create_ssl_context()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"certificates cannot be read: {error}; correct SSL_CERT_FILE and SSL_CERT_DIR, or unset them"
            ) from error
        try:
            self._clients = [self._open_pool() for _ in self._num_open]
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise ConfigError(
                f"a proxy that the environment names cannot be used: {error}; give an http:// one in ALL_PROXY, "
                "HTTP_PROXY and HTTPS_PROXY, or unset them"
            ) from error

    def _open_pool(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers={"Accept": "application/json", **self._credentials.sent, "Accept-Encoding": "identity"},
            verify=self.ssl_context,
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=POOL_CONNECTIONS),
            follow_redirects=False,
            trust_env=not self._address.is_loopback,  # no proxy stands between this machine and itself
        )

    async def post(self, endpoint: str, body: bytes) -> Reply:
        """Send one body of JSON. Raises: NoReplyError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post_by_least_busy(self._address.url_of(endpoint), body)
        except TimeoutError:
            raise NoReplyError(f"no complete response within {self._timeout_s:g} s", code="request_timeout") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = self._credentials.redact(_reason(error))
            is_fatal = _has_cause(error, ssl.SSLCertVerificationError)
            raise NoReplyError(
                f"no connection: {reason}", code="connection_error", is_unreachable=True, is_fatal=is_fatal
            ) from None
        except httpx2.RequestError as error:
            reason = self._credentials.redact(_reason(error))
            raise NoReplyError(f"the connection broke: {reason}", code="connection_error") from None

    async def _post_by_least_busy(self, url: str, body: bytes) -> Reply:
        pool = self._num_open.index(min(self._num_open))
        self._num_open[pool] += 1
        try:
            return await self._post(self._clients[pool], url, body)
        finally:
            self._num_open[pool] -= 1

    async def _post(self, client: httpx2.AsyncClient, url: str, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", url, content=body, headers=headers) as response:
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > self._max_response_bytes:
                    raise NoReplyError(
                        f"HTTP {response.status_code} with more than {self._max_response_bytes} bytes",
                        code="invalid_server_response",
                    )
            content_type = response.headers.get("content-type", "")
            text = text_of(bytes(received), content_type, self._max_response_bytes)
            clean = {name.lower(): self._credentials.redact(value) for name, value in response.headers.items()}
            return Reply(response.status_code, clean, self._credentials.redact(text), self._credentials)

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        for client in self._clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)


def _redacted(value: Any, credentials: Credentials) -> Any:
    """A JSON value without secrets, names included."""
    if isinstance(value, str):
        return credentials.redact(value)
    if isinstance(value, list):
        return [_redacted(item, credentials) for item in value]
    if isinstance(value, dict):
        return {credentials.redact(name): _redacted(item, credentials) for name, item in value.items()}
    return value


def _reason(error: Exception) -> str:
    if str(error):
        return str(error)
    return next((words for kind, words in _REASONS if isinstance(error, kind)), type(error).__name__)


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
