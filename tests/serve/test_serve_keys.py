"""Keys: who may come in, and that nobody sees what belongs to another key."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import CHAT, client_of, create, error_of, lines, running, settings_for, upload, wait_for
from starlette.testclient import TestClient

from blendserve.cli import main
from blendserve.errors import ConfigError
from blendserve.serve.keys import KeyFile
from blendserve.serve.server import check_reachable
from blendserve.serve.service import Service

NO_SERVER = "http://127.0.0.1:9/v1"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def two(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    keys = KeyFile(data)
    return bearer(keys.add("alice")[1]), bearer(keys.add("bob")[1])


@pytest.fixture
def client(data: Path, two: object) -> Iterator[TestClient]:  # noqa: ARG001
    with running(data) as found:
        yield found


PATHS = ("/v1/files", "/v1/batches", "/v1/models", "/metrics", "/v1/batches/x", "/v1/nothing")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("x"), bearer(""), {"Authorization": "Basic abc"}, {"Authorization": "Bearer\xff".encode("latin-1")}],
)
def test_without_a_key_nothing_is_shown(client: TestClient, path: str, headers: dict[str, str]) -> None:
    assert error_of(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"


def test_health_needs_no_key(client: TestClient) -> None:
    assert client.get("/health/live").status_code == 200


def test_other_keys_see_nothing(client: TestClient, two: tuple[dict[str, str], dict[str, str]]) -> None:
    alice, bob = two
    file_id = upload(client, lines(2), headers=alice)
    batch = create(client, file_id, headers=alice)
    done = wait_for(client, batch["id"], headers=alice)
    ids = [file_id, done["output_file_id"]]
    for id in ids:
        error_of(client.get(f"/v1/files/{id}", headers=bob), 404)
        error_of(client.get(f"/v1/files/{id}/content", headers=bob), 404)
        error_of(client.delete(f"/v1/files/{id}", headers=bob), 404)
    for path in ("", "/output", "/errors"):
        error_of(client.get(f"/v1/batches/{batch['id']}{path}", headers=bob), 404)
    error_of(client.post(f"/v1/batches/{batch['id']}/cancel", headers=bob), 404)
    error_of(client.delete(f"/v1/batches/{batch['id']}", headers=bob), 404)
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    error_of(client.post("/v1/batches", json=body, headers=bob), 404)
    error_of(client.get(f"/v1/batches?after={batch['id']}", headers=bob), 404)
    for path in ("/v1/files", "/v1/batches"):
        assert client.get(path, headers=bob).json()["data"] == []
        assert client.get(path, headers=alice).json()["data"]
    upload_body = {"bytes": 3, "filename": "a", "mime_type": "", "purpose": "batch"}
    begun = client.post("/v1/uploads", json=upload_body, headers=alice).json()["id"]
    error_of(client.post(f"/v1/uploads/{begun}/cancel", headers=bob), 404)
    error_of(client.post(f"/v1/uploads/{begun}/parts", files={"data": ("a", b"x")}, headers=bob), 404)


def test_an_idempotency_key_is_the_callers_own(client: TestClient, two: tuple[dict[str, str], dict[str, str]]) -> None:
    batches = [
        create(client, upload(client, lines(1), headers=headers), headers={**headers, "Idempotency-Key": "k"})
        for headers in two
    ]
    assert batches[0]["id"] != batches[1]["id"]


def test_a_revoked_key_is_out_at_once(client: TestClient, data: Path) -> None:
    _, secret = KeyFile(data).add("carol")
    assert client.get("/v1/files", headers=bearer(secret)).status_code == 200
    KeyFile(data).revoke("carol")
    error_of(client.get("/v1/files", headers=bearer(secret)), 401)


def test_keys_are_stored_hashed_for_our_eyes_alone(data: Path) -> None:
    key, secret = KeyFile(data).add("alice")
    stored = (data / "keys.json").read_text()
    assert secret not in stored
    assert key.sha256 in stored
    assert stat.S_IMODE((data / "keys.json").stat().st_mode) == 0o600
    found = KeyFile(data).find(secret)
    assert found == key
    assert KeyFile(data).find(secret[:-1]) is None


def test_limits_of_a_key(data: Path) -> None:
    keys = KeyFile(data)
    small = bearer(keys.add("small", max_bytes=1000)[1])
    short = bearer(keys.add("short", max_queued_lines=5)[1])
    with running(data, latency_s=5.0) as client:
        reply = client.post("/v1/files", files={"file": ("a", b"x" * 2000)}, data={"purpose": "batch"}, headers=small)
        assert error_of(reply, 507)["code"] == "no_space"
        file_id = upload(client, lines(6), headers=short)
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        reply = client.post("/v1/batches", json=body, headers=short)
        assert error_of(reply, 429)["code"] == "rate_limit_exceeded"
        assert int(reply.headers["Retry-After"]) > 0


def test_without_keys_only_this_machine_is_let_in(tmp_path: Path) -> None:
    with client_of(settings_for(tmp_path / "data", NO_SERVER)) as client:
        assert client.get("/v1/files").status_code == 200
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1", ""):
            assert client.get("/v1/files", headers={"Host": host}).status_code in (400, 403)
        for host in ("localhost:1234", "127.0.0.1", "[::1]:8000"):
            assert client.get("/v1/files", headers={"Host": host}).status_code == 200
        body = {"bytes": 1, "filename": "a", "mime_type": "", "purpose": "batch"}
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
            assert error_of(client.post("/v1/uploads", json=body, headers=headers), 403)["code"] == "origin_not_allowed"
        assert client.post("/v1/uploads", json=body, headers={"Origin": "http://localhost"}).status_code == 200


def test_an_address_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    service = Service(settings_for(tmp_path / "data", NO_SERVER, host="0.0.0.0"))
    with pytest.raises(ConfigError, match="blendserve keys add"):
        check_reachable(service)
    service.keys.add("alice")
    check_reachable(service)
    service.close()


def test_the_command_makes_lists_and_revokes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "alice", "--data", str(data), "--max-bytes", "1GiB"]) == 0
    secret = capsys.readouterr().out.strip()
    key = KeyFile(data).find(secret)
    assert key is not None
    assert (key.name, key.max_bytes) == ("alice", 1 << 30)
    assert main(["keys", "add", "alice", "--data", str(data)]) == 1
    assert main(["keys", "list", "--data", str(data), "--json"]) == 0
    listed = capsys.readouterr().out
    assert [entry["name"] for entry in json.loads(listed)] == ["alice"]
    assert secret not in listed
    assert main(["keys", "revoke", "alice", "--data", str(data)]) == 0
    assert main(["keys", "revoke", "alice", "--data", str(data)]) == 1
    assert KeyFile(data).keys() == ()


def test_a_damaged_key_file_lets_nobody_in(data: Path) -> None:
    (data / "keys.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        KeyFile(data).keys()


def test_neither_keys_nor_prompts_are_logged(
    client: TestClient, two: tuple[dict[str, str], dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "blendserve"):
        upload(client, lines(3, "secret-prompt"), headers=two[0])
        client.get("/v1/files", headers=bearer("bsk-wrong"))
    assert "secret-prompt" not in caplog.text
    assert "bsk-" not in caplog.text
