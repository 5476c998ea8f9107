"""A client of the Batch API: ours, OpenAI's, or any other. The commands `submit`, `batches` and `cancel` use it.

Requests that could not be heard or that the server was too busy for are sent again, with the wait that it asks for.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.credentials import Credentials
from blendserve.errors import BlendServeError, ConfigError

END_STATES = ("completed", "failed", "expired", "cancelled")
_TRIES = 6
_MAX_WAIT_S = 30.0
_BUSY = (408, 409, 429, 500, 502, 503, 504)


class BatchClient:
    """One server. Raises: BlendServeError with what the server said, or that it could not be reached."""

    def __init__(
        self,
        address: ServerAddress,
        key: Credentials,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = address
        self._key = key
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=address.base_url,
            headers=key.sent,
            timeout=httpx2.Timeout(600.0, connect=30.0),
            follow_redirects=False,
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def upload(self, path: Path) -> dict[str, Any]:
        """Store a batch file. It is read as it is sent."""

        def send() -> httpx2.Response:
            with _opened(path) as file:
                return self._http.post("/files", files={"file": (path.name, file)}, data={"purpose": "batch"})

        return self._json(send)

    def create(
        self, file_id: str, endpoint: str, window: str, metadata: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Make a batch. A request that is sent again makes no second one where the server knows Idempotency-Key."""
        body: dict[str, Any] = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
        if metadata:
            body["metadata"] = dict(metadata)
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._json(lambda: self._http.post("/batches", json=body, headers=headers))

    def batch(self, id: str) -> dict[str, Any]:
        return self._json(lambda: self._http.get(f"/batches/{_in_path(id)}"))

    def cancel(self, id: str) -> dict[str, Any]:
        return self._json(lambda: self._http.post(f"/batches/{_in_path(id)}/cancel"))

    def batches(self, limit: int) -> Iterator[dict[str, Any]]:
        """The newest batches, newest first."""
        after: str | None = None
        while limit > 0:
            query: dict[str, Any] = {"limit": min(limit, 100), **({"after": after} if after else {})}
            page = self._json(lambda query=query: self._http.get("/batches", params=query))  # type: ignore[misc]
            yield from page["data"]
            limit -= len(page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def wait(self, id: str, interval_s: float, notify: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Ask until the batch has ended; `notify` is told every state of it."""
        while True:
            batch = self.batch(id)
            notify(batch)
            if batch["status"] in END_STATES:
                return batch
            self._sleep(interval_s)

    def download(self, file_id: str, path: Path) -> int:
        """Write a file, whole or not at all. Returns: its bytes."""
        partial = path.with_name(path.name + ".partial")
        for tries_left in reversed(range(_TRIES)):
            try:
                with self._http.stream("GET", f"/files/{_in_path(file_id)}/content") as reply:
                    if reply.status_code != 200:
                        reply.read()
                        raise self._refusal(reply)
                    with partial.open("wb") as file:
                        for chunk in reply.iter_bytes(1 << 20):
                            file.write(chunk)
                        file.flush()
                        os.fsync(file.fileno())
                        num_bytes = file.tell()
                partial.replace(path)
                return num_bytes
            except httpx2.TransportError as error:
                if not tries_left:
                    raise self._silence(error) from error
                self._sleep(1.0)
            finally:
                partial.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _json(self, send: Callable[[], httpx2.Response]) -> dict[str, Any]:
        for tries in range(1, _TRIES + 1):
            try:
                reply = send()
            except httpx2.TransportError as error:
                if tries == _TRIES:
                    raise self._silence(error) from error
                self._sleep(min(_MAX_WAIT_S, 0.5 * 2**tries))
                continue
            if reply.status_code in _BUSY and tries < _TRIES and reply.headers.get("x-should-retry") != "false":
                self._sleep(_wait_s(reply, tries))
                continue
            if reply.status_code != 200:
                raise self._refusal(reply)
            try:
                value: dict[str, Any] = reply.json()
            except ValueError:
                break
            return value
        raise BlendServeError(f"{self._address.base_url} answered no JSON; is it an OpenAI-compatible server?")

    def _refusal(self, reply: httpx2.Response) -> BlendServeError:
        try:
            message = str(reply.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = reply.text[:300].strip() or reply.reason_phrase
        remedy = "; give the key in BLENDSERVE_API_KEY or OPENAI_API_KEY" if reply.status_code == 401 else ""
        said = self._key.redact(message)
        return BlendServeError(f"{self._address.base_url} answered {reply.status_code}: {said}{remedy}")

    def _silence(self, error: httpx2.TransportError) -> BlendServeError:
        reason = self._key.redact(str(error)) or type(error).__name__
        return BlendServeError(f"{self._address.base_url} does not answer ({reason}); is the service running there?")


def _wait_s(reply: httpx2.Response, tries: int) -> float:
    try:
        return min(_MAX_WAIT_S, float(reply.headers.get("retry-after-ms", "")) / 1000)
    except ValueError:
        pass
    try:
        return min(_MAX_WAIT_S, max(0.0, float(reply.headers.get("retry-after", ""))))
    except ValueError:
        return min(_MAX_WAIT_S, float(2 ** (tries - 1)))


def _in_path(id: str) -> str:
    """Raises: ConfigError for what is no id."""
    if not id or not all(character.isalnum() or character in "-_" for character in id):
        raise ConfigError(f"{id!r} is no id of a batch or a file; ids look like batch_68ac or file-1f0e")
    return id


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def endpoint_of(path: Path) -> str:
    """The url that the first line of a batch file names. Raises: ConfigError."""

    with _opened(path) as file:
        for line in file:
            if line.strip():
                try:
                    url = json.loads(line)["url"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
                return str(url)
    raise ConfigError(f"the first line of {path} names no url; name the endpoint with --endpoint")
