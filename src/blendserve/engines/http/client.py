"""One POST to an OpenAI-compatible server: what came back, or how it failed. Retrying is the caller's.

The key travels in one header to the one server that the user named: redirects are not followed, TLS is verified, and
whatever a server says is cleared of the key before anyone else sees it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

import httpx2

from blendserve.errors import ConfigError

CONNECT_TIMEOUT_S = 30.0
MAX_RESPONSE_BYTES = 64 << 20
POOL_CONNECTIONS = 32
"""A pool of the library looks at all its connections for every request: many small pools stay quick."""
MIN_SECRET_CHARACTERS = 12
"""Shorter keys are placeholders ("EMPTY", "x"): taking them out of texts would only damage the texts."""
_REDACTED = "[api key]"
_GOOD_URL = "it must look like http://localhost:8000/v1"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens. `base_url` is what OpenAI's own clients take: it ends in /v1, or the like."""

    base_url: str

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Raises: ConfigError when it is no http(s) URL, or carries what must not be written down."""
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is not a URL: {error}; {_GOOD_URL}") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                "--base-url must hold no user, password, query or fragment: it is written to the journal; give the key "
                "in BLENDSERVE_API_KEY"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url is {text!r}; {_GOOD_URL}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = parts.path.rstrip("/") or "/v1"
        address = cls(f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}")
        try:
            httpx2.URL(address.base_url).host.encode("idna")  # as a connection would
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"--base-url is {text!r}, to which nothing can be sent: {error}; {_GOOD_URL}") from None
        if port == 0:
            raise ConfigError(f"--base-url is {text!r}, and nothing listens on port 0; {_GOOD_URL}")
        return address

    def url_of(self, endpoint: str) -> str:
        """The address of an endpoint as batch lines name it (/v1/chat/completions)."""
        return self.base_url + endpoint.removeprefix("/v1")

    @property
    def is_loopback(self) -> bool:
        host = urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def is_private(self) -> bool:
        """Can nobody on the way read what is sent?"""
        return self.base_url.startswith("https:") or self.is_loopback


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A secret; it shows in no representation of itself. Raises: ConfigError when no header can hold it."""

    value: str = field(repr=False, default="")

    def __post_init__(self) -> None:
        if not all("!" <= character <= "~" for character in self.value):
            raise ConfigError("the API key holds spaces or characters that are not ASCII; set it again")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}

    @property
    def is_secret(self) -> bool:
        return len(self.value) >= MIN_SECRET_CHARACTERS

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.value, _REDACTED) if self.is_secret else text


def find_api_key(environment: Mapping[str, str], address: ServerAddress) -> ApiKey:
    """BLENDSERVE_API_KEY, else OPENAI_API_KEY; the latter, meant for another server perhaps, never goes unencrypted
    to another machine.
    """
    own = environment.get("BLENDSERVE_API_KEY", "").strip()
    general = environment.get("OPENAI_API_KEY", "").strip() if address.is_private else ""
    return ApiKey(own or general)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response, key redacted. Header names are in lower case."""

    status_code: int
    headers: Mapping[str, str]
    text: str
    key: ApiKey = field(default_factory=ApiKey)

    def json(self) -> Any:
        """The text decoded, and cleared of the key again: JSON may have held it in escapes. Raises: ValueError when it
        is no JSON or holds what no row can, RecursionError when it is nested too deeply.
        """
        value = json.loads(self.text, parse_constant=_reject)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity, which no row can hold
        return _redacted(value, self.key) if self.key.is_secret else value


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
        key: ApiKey,
        *,
        timeout_s: float,
        max_connections: int,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._address = address
        self._key = key
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
                f"a proxy of the environment cannot be used: {error}; give an http:// one in ALL_PROXY, HTTP_PROXY and "
                "HTTPS_PROXY, or unset them"
            ) from error

    def _open_pool(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers={**self._key.headers, "Accept": "application/json", "Accept-Encoding": "identity"},
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
            raise NoReplyError(f"no whole response within {self._timeout_s:g} s", code="request_timeout") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = self._key.redact(_reason(error))
            is_fatal = _has_cause(error, ssl.SSLCertVerificationError)
            raise NoReplyError(
                f"no connection: {reason}", code="connection_error", is_unreachable=True, is_fatal=is_fatal
            ) from None
        except httpx2.RequestError as error:
            reason = self._key.redact(_reason(error))
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
            try:
                text = received.decode(errors="strict" if response.status_code == 200 else "replace")
            except UnicodeDecodeError as error:
                raise NoReplyError(f"HTTP 200 with no UTF-8: {error}", code="invalid_server_response") from None
            clean = {name.lower(): self._key.redact(value) for name, value in response.headers.items()}
            return Reply(response.status_code, clean, self._key.redact(text), self._key)

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        for client in self._clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)


def _redacted(value: Any, key: ApiKey) -> Any:
    """A JSON value without the key, names included."""
    if isinstance(value, str):
        return key.redact(value)
    if isinstance(value, list):
        return [_redacted(item, key) for item in value]
    if isinstance(value, dict):
        return {key.redact(name): _redacted(item, key) for name, item in value.items()}
    return value


def _reject(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
