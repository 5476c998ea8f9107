"""Where a server listens, and the address of each of its endpoints."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import httpx2

from blendserve.errors import ConfigError

_GOOD_URL = "it must look like http://localhost:8000/v1"
_ENDPOINT = re.compile(r"/(chat/completions|completions|embeddings|responses|moderations|rerank|score|messages)$")
_VERSION = re.compile(r"/v\d+\w*$")
_SECRET_WORDS = re.compile(r"key|token|secret|password|passwd|credential|auth|sig|signature|code", re.IGNORECASE)
_AZURE_DOMAINS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """`base_url` is what OpenAI's own clients take: it ends in /v1, or the like. `query` goes with every request."""

    base_url: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Read --base-url; the address of an endpoint stands for that of its server. Raises: ConfigError when it is no
        http(s) URL, or carries what must not be written down.
        """
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is not a URL: {error}; {_GOOD_URL}") from None
        if parts.username or parts.password or parts.fragment or _has_secret(parts.query):
            raise ConfigError(
                "--base-url must hold no user, password, key or fragment: it is written to the journal; give the key "
                "in BLENDSERVE_API_KEY, or with --header"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url is {text!r}; {_GOOD_URL}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        given = parts.path.rstrip("/")
        path = _ENDPOINT.sub("", given) or ("" if given else _usual_path(parts.hostname))
        address = cls(f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}", parts.query)
        try:
            httpx2.URL(str(address)).host.encode("idna")  # as a connection would
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"--base-url is {text!r}, to which nothing can be sent: {error}; {_GOOD_URL}") from None
        if port == 0:
            raise ConfigError(f"--base-url is {text!r}, and nothing listens on port 0; {_GOOD_URL}")
        return address

    def __str__(self) -> str:
        return self.base_url + self._suffix

    def url_of(self, endpoint: str) -> str:
        """The address of an endpoint as batch lines name it. One that begins with /v1 is an endpoint of `base_url`;
        any other stands beside the version that `base_url` ends in.
        """
        if endpoint.startswith("/v1/"):
            return self.base_url + endpoint.removeprefix("/v1") + self._suffix
        return _VERSION.sub("", self.base_url) + endpoint + self._suffix

    @property
    def _suffix(self) -> str:
        return f"?{self.query}" if self.query else ""

    @property
    def is_azure(self) -> bool:
        """Does the server take keys in Azure's own header?"""
        return self._host.endswith(_AZURE_DOMAINS)

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self._host).is_loopback
        except ValueError:
            return self._host == "localhost"

    @property
    def is_private(self) -> bool:
        """Can nobody on the way read what is sent?"""
        return self.base_url.startswith("https:") or self.is_loopback

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).hostname or ""


def is_secret_name(name: str) -> bool:
    """Does this name of a header or of a part of a query tell that its value is a secret?"""
    return any(_SECRET_WORDS.fullmatch(word) for word in re.split(r"[^a-zA-Z]+", name)) or bool(
        re.search(r"api_?key|access_?token|authorization|cookie", name, re.IGNORECASE)
    )


def _has_secret(query: str) -> bool:
    return any(is_secret_name(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def _usual_path(host: str) -> str:
    return "/openai/v1" if host.endswith(_AZURE_DOMAINS) else "/v1"
