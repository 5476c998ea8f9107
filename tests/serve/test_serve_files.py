"""Files and uploads: what is stored, what is refused, and that nothing half written stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import client_of, error_of, lines, running, settings_for, upload
from starlette.testclient import TestClient

from blendserve.serve.multipart import safe_filename
from blendserve.serve.settings import Limits

NO_SERVER = "http://127.0.0.1:9/v1"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(settings_for(tmp_path / "data", NO_SERVER)) as found:
        yield found


def stored(tmp_path: Path) -> list[str]:
    return sorted(path.name for part in ("files", "partial") for path in (tmp_path / "data" / part).iterdir())


def form(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return body + f"--{boundary}--\r\n".encode()


def post(client: TestClient, body: bytes, content_type: str = "multipart/form-data; boundary=b") -> object:
    return client.post("/v1/files", content=body, headers={"Content-Type": content_type})


def test_a_file_is_stored_byte_by_byte(client: TestClient, tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    id = upload(client, data, "räw.jsonl")
    found = client.get(f"/v1/files/{id}").json()
    assert (found["bytes"], found["filename"], found["purpose"]) == (len(data), "räw.jsonl", "batch")
    assert (found["object"], found["status"]) == ("file", "processed")
    assert found["expires_at"] == found["created_at"] + 30 * 86400
    content = client.get(f"/v1/files/{id}/content")
    assert content.content == data
    assert content.headers["content-length"] == str(len(data))
    part = client.get(f"/v1/files/{id}/content", headers={"Range": "bytes=256-511"})
    assert (part.status_code, part.content) == (206, bytes(range(256)))
    assert client.get(f"/v1/files/{id}/content", headers={"Range": "bytes=9999999-"}).status_code == 416
    assert client.delete(f"/v1/files/{id}").json() == {"id": id, "object": "file", "deleted": True}
    error_of(client.get(f"/v1/files/{id}"), 404)
    error_of(client.get(f"/v1/files/{id}/content"), 404)
    assert stored(tmp_path) == []


def test_lists_have_an_order_a_limit_and_a_purpose(client: TestClient) -> None:
    ids = [upload(client, b"x", f"{n}.jsonl") for n in range(3)]
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == ids[::-1]
    assert [file["id"] for file in client.get("/v1/files?order=asc&limit=2").json()["data"]] == ids[:2]
    assert client.get(f"/v1/files?order=asc&after={ids[1]}").json()["data"][0]["id"] == ids[2]
    assert client.get("/v1/files?purpose=batch_output").json()["data"] == []
    error_of(client.get("/v1/files?order=up"), 400)
    error_of(client.get("/v1/files?limit=10001"), 400)


BROKEN = {
    "no form": (b"{}", "application/json"),
    "no boundary": (b"", "multipart/form-data"),
    "empty": (b"", "multipart/form-data; boundary=b"),
    "another boundary": (form(('name="file"; filename="a"', b"x")), "multipart/form-data; boundary=c"),
    "cut off": (form(('name="purpose"', b"batch"), ('name="file"; filename="a"', b"x"))[:-20], ""),
    "no file": (form(('name="purpose"', b"batch")), ""),
    "no purpose": (form(('name="file"; filename="a"', b"x")), ""),
    "another purpose": (form(('name="purpose"', b"fine-tune"), ('name="file"; filename="a"', b"x")), ""),
    "two files": (form(*[('name="file"; filename="a"', b"x")] * 2, ('name="purpose"', b"batch")), ""),
    "no name": (form(('filename="a"', b"x")), ""),
    "a field twice": (form(*[('name="purpose"', b"batch")] * 2, ('name="file"; filename="a"', b"x")), ""),
    "many parts": (form(*[(f'name="f{n}"', b"") for n in range(40)]), ""),
    "a large field": (form(('name="purpose"', b"x" * 100_000)), ""),
    "a field of no text": (form(('name="purpose"', b"\xff")), ""),
    "a large header": (form((f'name="{"n" * 9000}"', b"")), ""),
    "bad lifetime": (
        form(
            ('name="purpose"', b"batch"), ('name="expires_after[seconds]"', b"5"), ('name="file"; filename="a"', b"x")
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_form_is_refused_and_leaves_nothing(client: TestClient, tmp_path: Path, name: str) -> None:
    body, content_type = BROKEN[name]
    error = error_of(post(client, body, content_type or "multipart/form-data; boundary=b"), 400)
    assert error["type"] == "invalid_request_error"
    assert stored(tmp_path) == []


def test_a_lifetime_can_be_given(client: TestClient) -> None:
    fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = client.post("/v1/files", files={"file": ("a", b"x")}, data=fields).json()
    assert file["expires_at"] == file["created_at"] + 3600


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\boot.ini", "/etc/shadow", "a\0b", "x\r\ny", "..", ""])
def test_names_never_become_paths(client: TestClient, tmp_path: Path, name: str) -> None:
    shown = safe_filename(name)
    assert shown
    assert not set(shown) & set("/\\\0\r\n")
    id = upload(client, b"x", name or "file")
    assert not set(client.get(f"/v1/files/{id}").json()["filename"]) & set("/\\\0\r\n")
    assert stored(tmp_path) == [id]


@pytest.mark.parametrize("id", ["..%2f..%2fkeys.json", "file_" + "0" * 32, "file_%00", "x" * 3000, "service.db"])
def test_ids_that_are_none_are_not_found(client: TestClient, id: str) -> None:
    error_of(client.get(f"/v1/files/{id}"), 404)
    error_of(client.get(f"/v1/batches/{id}"), 404)
    error_of(client.delete(f"/v1/files/{id}"), 404)


@pytest.mark.parametrize(
    ("limits", "status_code"),
    [
        (Limits(max_file_bytes=1000, min_free_bytes=0), 413),
        (Limits(quota_bytes=1000, min_free_bytes=0), 507),
        (Limits(min_free_bytes=1 << 60), 507),
    ],
    ids=["largest file", "quota", "free space"],
)
def test_what_is_too_much_is_refused_and_leaves_nothing(tmp_path: Path, limits: Limits, status_code: int) -> None:
    with client_of(settings_for(tmp_path / "data", NO_SERVER, limits=limits)) as client:
        announced = client.post("/v1/files", files={"file": ("a", b"x" * 3_000_000)}, data={"purpose": "batch"})
        assert error_of(announced, status_code)["message"]

        def chunks() -> Iterator[bytes]:
            yield form(('name="purpose"', b"batch"), ('name="file"; filename="a"', b""))[:-9]
            yield from [b"x" * 1_000_000] * 3

        streamed = client.post(
            "/v1/files", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        error_of(streamed, status_code)
        assert stored(tmp_path) == []


def test_files_expire(tmp_path: Path) -> None:
    now = 1_700_000_000.0
    with client_of(settings_for(tmp_path / "data", NO_SERVER), clock=lambda: now) as client:
        id = upload(client, b"x")
        now += 30 * 86400 + 1
        error_of(client.get(f"/v1/files/{id}"), 404)
        client.app.state.service.library.sweep()  # type: ignore[attr-defined]
        assert stored(tmp_path) == []


def announce(client: TestClient, num_bytes: int) -> str:
    body = {"bytes": num_bytes, "filename": "big.jsonl", "mime_type": "application/jsonl", "purpose": "batch"}
    reply = client.post("/v1/uploads", json=body).json()
    assert reply["status"] == "pending"
    id: str = reply["id"]
    return id


def send(client: TestClient, upload_id: str, data: bytes) -> str:
    reply = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", data)}).json()
    assert (reply["object"], reply["upload_id"]) == ("upload.part", upload_id)
    id: str = reply["id"]
    return id


def test_an_upload_joins_its_parts_in_the_order_that_is_asked_for(client: TestClient, tmp_path: Path) -> None:
    id = announce(client, 6)
    second, first = send(client, id, b"def"), send(client, id, b"abc")
    body = {"part_ids": [first, second], "md5": hashlib.md5(b"abcdef").hexdigest()}
    done = client.post(f"/v1/uploads/{id}/complete", json=body).json()
    assert (done["status"], done["file"]["bytes"]) == ("completed", 6)
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == b"abcdef"
    assert stored(tmp_path) == [done["file"]["id"]]
    error_of(client.post(f"/v1/uploads/{id}/complete", json=body), 400)


def test_an_upload_that_is_not_what_was_announced_is_refused(client: TestClient) -> None:
    id = announce(client, 6)
    part = send(client, id, b"abc")
    wrong_lists: tuple[object, ...] = ([part], [part, part], [], ["part_none"], "x")
    for part_ids in wrong_lists:
        error_of(client.post(f"/v1/uploads/{id}/complete", json={"part_ids": part_ids}), 400)
    more = send(client, id, b"def")
    wrong = {"part_ids": [part, more], "md5": "0" * 32}
    assert error_of(client.post(f"/v1/uploads/{id}/complete", json=wrong), 400)["code"] == "checksum_mismatch"
    error_of(client.post(f"/v1/uploads/{id}/parts", files={"data": ("p", b"x" * 100)}), 400)


def test_a_cancelled_upload_leaves_nothing(client: TestClient, tmp_path: Path) -> None:
    id = announce(client, 6)
    send(client, id, b"abc")
    assert client.post(f"/v1/uploads/{id}/cancel").json()["status"] == "cancelled"
    assert stored(tmp_path) == []
    error_of(client.post(f"/v1/uploads/{id}/parts", files={"data": ("p", b"x")}), 400)


def test_orphans_are_swept_when_a_service_starts(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", NO_SERVER)
    with client_of(settings) as client:
        id = upload(client, b"x")
    orphan = "part_" + "0" * 32
    (tmp_path / "data" / "files" / orphan).write_bytes(b"lost")
    (tmp_path / "data" / "partial" / "half").write_bytes(b"lost")
    with client_of(settings) as client:
        assert stored(tmp_path) == [id]
        assert client.get(f"/v1/files/{id}").status_code == 200


def test_the_input_of_a_batch_that_runs_cannot_be_deleted(tmp_path: Path) -> None:
    with running(tmp_path / "data", latency_s=1.0) as client:
        id = upload(client, lines(3))
        body = {"input_file_id": id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        client.post("/v1/batches", json=body)
        assert error_of(client.delete(f"/v1/files/{id}"), 400)["code"] == "file_in_use"
