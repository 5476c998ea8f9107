"""What a caller shows to a server: a key, and headers of the user's own. Secrets among them appear nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from blendserve.engines.http.address import ServerAddress, is_secret_name
from blendserve.errors import ConfigError

MIN_SECRET_CHARACTERS = 12
"""Shorter keys are placeholders ("EMPTY", "x"): taking them out of texts would only damage the texts."""
_REDACTED = "[api key]"
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OUR_HEADERS = frozenset(
    (
        *("content-type", "content-length", "content-encoding", "transfer-encoding", "accept-encoding", "connection"),
        *("te", "trailer", "upgrade", "expect", "keep-alive", "proxy-connection"),
    )
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key and further headers; they show in no representation of this. `is_azure`: the key goes into Azure's header.

    Raises: ConfigError when no request can hold them.
    """

    key: str = field(repr=False, default="")
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    is_azure: bool = False
    _secrets: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if not all("!" <= character <= "~" for character in self.key):
            raise ConfigError("the API key holds spaces or characters that are not ASCII; set it again")
        for name, value in self.headers.items():
            _check_header(name, value)
        texts = [self.key]
        for name, value in self.headers.items():
            if is_secret_name(name):
                texts += [value, *re.split(r"[\s;,=]+", value)]
        secrets = {text for text in texts if len(text) >= MIN_SECRET_CHARACTERS}
        object.__setattr__(self, "_secrets", tuple(sorted(secrets, key=len, reverse=True)))

    @property
    def sent(self) -> dict[str, str]:
        """Every header that goes with a request; the user's own come first."""
        given = {name.lower() for name in self.headers}
        name = "api-key" if self.is_azure and not self.key.startswith("eyJ") else "Authorization"  # else a web token
        of_key = {name: self.key if name == "api-key" else f"Bearer {self.key}"}
        return dict(self.headers) | (of_key if self.key and name.lower() not in given else {})

    @property
    def has_secret(self) -> bool:
        return bool(self._secrets)

    def redact(self, text: str) -> str:
        """The text without the secrets."""
        for secret in self._secrets:
            text = text.replace(secret, _REDACTED)
        return text


def find_credentials(
    environment: Mapping[str, str], address: ServerAddress, headers: Mapping[str, str] | None = None
) -> Credentials:
    """BLENDSERVE_API_KEY, else OPENAI_API_KEY, beside the headers. The latter key, meant for another server perhaps,
    never goes unencrypted to another machine, nor beside a secret of the user's own.
    """
    headers = headers or {}
    own = environment.get("BLENDSERVE_API_KEY", "").strip()
    is_needed = address.is_private and not any(map(is_secret_name, headers))
    general = environment.get("OPENAI_API_KEY", "").strip() if is_needed else ""
    return Credentials(own or general, headers, is_azure=address.is_azure)


def _check_header(name: str, value: str) -> None:
    if not _HEADER_NAME.fullmatch(name):
        raise ConfigError(f"--header names {name!r}, which is no header name; write NAME=VALUE")
    if name.lower() in _OUR_HEADERS:
        raise ConfigError(f"--header sets {name}, which BlendServe sets itself; leave it out")
    if (
        not value
        or not all(" " <= character <= "~" or character == "\t" for character in value)
        or value.strip() != value
    ):
        raise ConfigError(f"--header {name} is empty, or holds characters that no header can hold; set it again")
