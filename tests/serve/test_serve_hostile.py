"""Hostile clients and bad days: broken requests, slow and stalled clients, a full disk, a clock that jumps."""

from __future__ import annotations

import errno
import io
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
import httpx2
from serve_cases import client_of, create, error_of, lines, running, settings_for, upload, wait_for, wait_until
from serve_mutations import read_mutated_forms, validate_mutated_lines
from serve_sockets import exchange, listening
from starlette.testclient import TestClient

from blendserve.errors import CapacityError, ConfigError
from blendserve.serve import batches as batches_module
from blendserve.serve import finalize, server
from blendserve.serve.app import make_app
from blendserve.serve.blobs import DirectoryBlobs
from blendserve.serve.clock import steady_clock
from blendserve.serve.failures import ApiError
from blendserve.serve.multipart import boundary_of
from blendserve.serve.records import BatchRecord, new_id
from blendserve.serve.service import Service
from blendserve.serve.settings import Limits

NO_SERVER = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a service under uvicorn, impatient with slow clients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HEADER_S", 0.4)
        limits = Limits(min_free_bytes=0, stall_s=0.4)
        with listening(
            Service(settings_for(tmp_path_factory.mktemp("hostile") / "data", NO_SERVER, limits=limits))
        ) as port:
            yield port


HEAD = b"POST /v1/uploads HTTP/1.1\r\nHost: localhost\r\n"
SMUGGLED = b"GET /v1/batches HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\n{}x" + SMUGGLED,
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 0x10\r\n\r\n{}",
        HEAD + b"Content-Length: +3\r\n\r\n{}x",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Content-Length : 3\r\n\r\n{}x",
        b"GET /v1/files HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 20,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: 1\r\n" * 20_000 + b"\r\n",
    ],
    ids=range(12),
)
def test_requests_of_doubtful_length_are_refused_and_hide_no_other(port: int, data: bytes) -> None:
    found = exchange(port, data)
    assert found.count(b"HTTP/1.1 ") <= 1
    assert found == b"" or found.startswith(b"HTTP/1.1 4")
    assert b'"object"' not in found


def test_a_body_with_two_lengths_is_read_by_one_of_them(port: int) -> None:
    body = b"2\r\n{}\r\n0\r\n\r\n"
    found = exchange(
        port, HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body
    )
    assert found.count(b"HTTP/1.1 ") == 1


def test_a_head_that_drips_is_cut_off(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), 5)) as client:
        client.sendall(b"GET /v1/files HT")
        client.settimeout(10)
        assert client.recv(100) == b""


def test_a_second_head_that_drips_is_cut_off(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), 5)) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(10)
        found = client.recv(65536)
        client.sendall(b"GET /hea")
        while part := client.recv(65536):
            found += part
        assert found.count(b"HTTP/1.1 200") == 1


def test_an_upload_that_stalls_is_answered_and_leaves_nothing(port: int) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    found = exchange(port, head + b"Content-Length: 100000\r\n\r\n" + part + b"x" * 500)
    assert found.startswith(b"HTTP/1.1 408")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_slow_clients_hold_nobody_up(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(64)]
    try:
        for client in slow:
            client.sendall(b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert httpx2.get(f"http://127.0.0.1:{port}/v1/batches").status_code == 200
    finally:
        for client in slow:
            client.close()


# Broken forms and lines


def test_mutated_forms_are_read_or_refused() -> None:
    found = read_mutated_forms(400, 1)
    assert found.total() == 400
    assert min(found["forms read"], found["forms refused"]) > 20


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "multipart/form-data; boundary=", "multipart/mixed; boundary=b", "\xff"]
)
def test_what_is_no_form(content_type: str | None) -> None:
    with pytest.raises(ApiError):
        boundary_of(content_type)


def test_mutated_lines_are_taken_or_refused(tmp_path: Path) -> None:
    found = validate_mutated_lines(tmp_path, 400, 1)
    assert found.total() == 400
    assert min(found["files taken"], found["files refused"]) > 10


@pytest.mark.thorough
def test_many_mutated_inputs_are_read_or_refused(tmp_path: Path) -> None:
    assert (read_mutated_forms(20_000, 2) + validate_mutated_lines(tmp_path, 20_000, 2)).total() == 40_000


# Bad days


class FullFile(io.BytesIO):
    def write(self, data: object) -> int:  # noqa: ARG002
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(settings_for(tmp_path / "data", NO_SERVER)) as client:
        with monkeypatch.context() as patch:
            patch.setattr("blendserve.serve.blobs.os.fdopen", lambda *_: FullFile())
            reply = client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
            assert error_of(reply, 507)["code"] == "no_space"
        assert list((tmp_path / "data" / "partial").iterdir()) == []
        assert client.get("/v1/files").json()["data"] == []
        upload(client, b"x")


def test_a_batch_waits_for_space_and_then_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tries = 0
    write_files = finalize.write_files

    def full_twice(*args: object, **fields: object) -> object:
        nonlocal num_tries
        num_tries += 1
        if num_tries <= 2:
            raise CapacityError("no space left")
        return write_files(*args, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "write_files", full_twice)
    monkeypatch.setattr(batches_module, "_RETRY_S", 0.05)
    with running(tmp_path / "data") as client:
        assert wait_for(client, create(client, upload(client, lines(3)))["id"])["status"] == "completed"
    assert num_tries == 3


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write in"):
        Service(settings_for(tmp_path / "file" / "data", NO_SERVER))
    (tmp_path / "files").write_text("x")
    with pytest.raises(ConfigError, match="cannot write in"):
        DirectoryBlobs(tmp_path)


def test_a_clock_that_jumps_moves_nothing() -> None:
    wall, ticks = 1000.0, 50.0
    clock = steady_clock(lambda: wall, lambda: ticks)
    assert clock() == 1000.0
    wall, ticks = 5.0, 60.0
    assert clock() == 1010.0
    wall, ticks = 1e12, 61.0
    assert clock() == 1011.0


def test_a_window_that_ends_keeps_what_is_done(tmp_path: Path) -> None:
    now = 1_700_000_000.0
    with running(tmp_path / "data", latency_s=0.3, clock=lambda: now) as client:
        batch = create(client, upload(client, lines(500)), window="1m")
        wait_until(lambda: bool(client.get(f"/v1/batches/{batch['id']}/output").content))
        now += 61.0
        done = wait_for(client, batch["id"])
        assert done["status"] == "expired"
        assert done["expired_at"] >= done["expires_at"]
        outputs = client.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()
        errors = client.get(f"/v1/files/{done['error_file_id']}/content").text.splitlines()
        assert len(outputs) + len(errors) == 500
        assert outputs
        assert {json.loads(row)["error"]["code"] for row in errors} == {"batch_expired"}


def test_ten_thousand_batches_are_listed_in_full(tmp_path: Path) -> None:
    with client_of(settings_for(tmp_path / "data", NO_SERVER)) as client:
        store = client.app.state.service.store  # type: ignore[attr-defined]
        made = [
            BatchRecord(new_id("batch"), "", 1, "file_1", "/v1/completions", "24h", 2, "", "", status="completed")
            for _ in range(10_000)
        ]
        store.put(*made)
        found: list[str] = []
        after = ""
        while True:
            page = client.get(f"/v1/batches?limit=100{after}").json()
            found += [batch["id"] for batch in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert found == [batch.id for batch in reversed(made)]


def test_a_client_is_never_shown_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(Service(settings_for(tmp_path / "data", NO_SERVER)))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        monkeypatch.setattr(app.state.service.library, "file", lambda *_: 1 / 0)
        error = error_of(client.get("/v1/files/file_1"), 500)
        assert "ZeroDivision" not in error["message"]
