"""A service over the fake server: its settings, its client, and batches to send it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from starlette.testclient import TestClient

from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.engines.settings import HttpSettings
from blendserve.serve.app import make_app
from blendserve.serve.clock import Clock
from blendserve.serve.service import Service
from blendserve.serve.settings import Limits, ModelChoice, ServeSettings

CHAT = "/v1/chat/completions"
Reply = httpx2.Response


def settings_for(data: Path, base_url: str, **fields: Any) -> ServeSettings:
    """One model called m, answered by the server at `base_url`."""
    limits = fields.pop("limits", Limits(min_free_bytes=0, stall_s=5.0))
    engine = HttpSettings(base_url=base_url, model="m", max_attempts=3, max_outage_s=5.0)
    models = fields.pop("models", (ModelChoice("m", engine),))
    return ServeSettings(data=data, models=models, limits=limits, **fields)


@contextmanager
def client_of(settings: ServeSettings, clock: Clock | None = None, **fields: Any) -> Iterator[TestClient]:
    """A client of a running service."""
    app = make_app(Service(settings, clock))
    with TestClient(app, base_url="http://localhost", **fields) as client:
        yield client


@contextmanager
def running(data: Path, *, latency_s: float = 0.0, clock: Clock | None = None, **fields: Any) -> Iterator[TestClient]:
    """A client of a service, over a fake server of its own."""
    with (
        serving(FakeSettings(latency_s=latency_s)) as server,
        client_of(settings_for(data, server.base_url, **fields), clock) as client,
    ):
        yield client


def line(custom_id: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"what is {custom_id}?"}], "max_tokens": 4}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {**body, **fields.pop("body", {})}, **fields}


def lines(count: int, prefix: str = "id") -> bytes:
    return b"".join(json.dumps(line(f"{prefix}-{number}")).encode() + b"\n" for number in range(count))


def upload(client: TestClient, data: bytes, name: str = "in.jsonl", **fields: Any) -> str:
    """Returns: the id of a new file."""
    reply = client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "batch"}, **fields)
    assert reply.status_code == 200, reply.text
    id: str = reply.json()["id"]
    return id


def create(client: TestClient, file_id: str, window: str = "24h", **fields: Any) -> dict[str, Any]:
    """Returns: a new batch."""
    headers = fields.pop("headers", {})
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": window, **fields}
    reply = client.post("/v1/batches", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    batch: dict[str, Any] = reply.json()
    return batch


def wait_for(
    client: TestClient, id: str, *statuses: str, seconds: float = 30.0, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """The batch once it is in one of the states (default: any that it does not leave)."""
    wanted = statuses or ("completed", "failed", "expired", "cancelled")
    batch: dict[str, Any] = {}

    def is_there() -> bool:
        batch.update(client.get(f"/v1/batches/{id}", headers=headers).json())
        return batch["status"] in wanted

    wait_until(is_there, seconds)
    return batch


def wait_until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def rows_of(client: TestClient, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    reply = client.get(f"/v1/files/{file_id}/content")
    assert reply.status_code == 200, reply.text
    return [json.loads(row) for row in reply.content.splitlines()]


def error_of(reply: Any, status_code: int) -> dict[str, Any]:
    """The error of a reply, whose shape is checked."""
    assert reply.status_code == status_code, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error
