"""API keys: made once, stored hashed in `keys.json`, compared in constant time. The commands `keys` and `serve` use it.

A key has 256 random bits, so a plain hash of it cannot be searched. The service reads the file again when it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from blendserve.errors import ConfigError
from blendserve.job.disk import open_own, replace_durably

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PREFIX = "bsk-"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `id` owns the files and batches that the key makes. A limit of None is the service's.

    `max_bytes`: of stored files. `max_queued_lines`: of batches that are not finished. `max_uploads`: at once.
    """

    id: str
    name: str
    sha256: str
    created_at: int
    hint: str
    max_bytes: int | None = None
    max_queued_lines: int | None = None
    max_uploads: int | None = None


class KeyFile:
    """The keys of a data directory."""

    def __init__(self, data: Path) -> None:
        self._path = data / "keys.json"
        self._name = os.fspath(self._path)
        self._data = data
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def keys(self) -> tuple[ApiKey, ...]:
        """All keys, read again where the file changed. Raises: ConfigError when it is damaged."""
        found = None
        if os.access(self._name, os.F_OK):  # every request comes here, and an error of `stat` is slow
            with suppress(FileNotFoundError):
                found = os.stat(self._name)
        if found is None:
            self._stamp, self._keys = None, ()
            return ()
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp != self._stamp:
            self._keys, self._stamp = self._read(), stamp
        return self._keys

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret. Every stored key is compared, each in constant time."""
        digest = _hash(secret)
        found = None
        for key in self.keys():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def add(
        self,
        name: str,
        *,
        max_bytes: int | None = None,
        max_queued_lines: int | None = None,
        max_uploads: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key. Returns: the key, and its secret, which is stored nowhere."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a key; use 1 to 64 letters, digits, dots, dashes and @")
        secret = _PREFIX + secrets.token_urlsafe(32)
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise ConfigError(f"there is a key called {name} already; revoke it first, or choose another name")
            key = ApiKey(
                id=secrets.token_hex(8),
                name=name,
                sha256=_hash(secret),
                created_at=int(time.time()),
                hint=secret[:8],
                max_bytes=max_bytes,
                max_queued_lines=max_queued_lines,
                max_uploads=max_uploads,
            )
            keys.append(key)
        return key, secret

    def revoke(self, name: str) -> ApiKey:
        """Delete a key. What it made stays, and nobody can reach it any more. Raises: ConfigError."""
        with self._changing() as keys:
            found = next((key for key in keys if name in (key.name, key.id)), None)
            if found is None:
                raise ConfigError(f"there is no key called {name}; see `blendserve keys list`")
            keys.remove(found)
        return found

    @contextmanager
    def _changing(self) -> Iterator[list[ApiKey]]:
        lock = open_own(self._data / "keys.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(self._read()) if self._path.exists() else []
            yield keys
            replace_durably(self._path, json.dumps([asdict(key) for key in keys], indent=1).encode())
        finally:
            os.close(lock)

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            return tuple(ApiKey(**values) for values in json.loads(self._path.read_bytes()))
        except (ValueError, TypeError):
            raise ConfigError(f"{self._path} is damaged; restore it, or delete it and make new keys") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
