"""Polls are answered before the application is asked; nobody may notice."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import CHAT, settings_for
from serve_process import service_process
from serve_sockets import exchange, listening

from blendserve.serve.app import make_app
from blendserve.serve.keys import KeyFile
from blendserve.serve.polls import Polls
from blendserve.serve.records import BatchRecord, new_id
from blendserve.serve.service import Service

NO_SERVER = "http://127.0.0.1:9/v1"


def batch(owner: str = "", **fields: object) -> BatchRecord:
    made = BatchRecord(new_id("batch"), owner, 1, "file_1", CHAT, "24h", 1 << 40, "", "", **fields)  # type: ignore[arg-type]
    return replace(made, metadata={"name": "ä"}, status="completed")


def poll(id: str, headers: str = "", method: str = "GET") -> bytes:
    return f"{method} /v1/batches/{id} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("polls") / "data"


@pytest.fixture(scope="module")
def service(data: Path) -> Iterator[tuple[Service, int]]:
    found = Service(settings_for(data, NO_SERVER))
    with listening(found) as port:
        yield found, port


def answer_of(data: bytes) -> tuple[bytes, dict[bytes, bytes], object]:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines)
    headers.pop(b"x-request-id"), headers.pop(b"date", None), headers.pop(b"connection", None)
    return status, headers, json.loads(body)


def test_a_poll_is_answered_as_the_application_answers_it(
    service: tuple[Service, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, port = service
    made = [batch(), replace(batch(), status="in_progress")]
    running.store.put(*made)
    for one in made:
        quick = answer_of(exchange(port, poll(one.id), end=b"}"))
        with monkeypatch.context() as patch:
            patch.setattr(Polls, "answer", lambda *_: None)
            slow = answer_of(exchange(port, poll(one.id), end=b"}"))
        again = answer_of(exchange(port, poll(one.id), end=b"}"))
        assert slow in (quick, again)  # the service may move the batch on meanwhile
        assert quick[0] == b"HTTP/1.1 200 OK"
    running.store.delete(*made)
    assert answer_of(exchange(port, poll(made[0].id), end=b"}"))[0] == b"HTTP/1.1 404 Not Found"


def test_a_connection_goes_on_after_polls_and_between_them(service: tuple[Service, int]) -> None:
    running, port = service
    made = batch()
    running.store.put(made)
    health = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", port), 5)) as client, client.makefile("rb") as found:
        client.settimeout(5)
        for sent, num_answers in (
            ([poll(made.id)], 1),
            ([health], 1),
            ([poll(made.id)], 1),
            ([poll(made.id) * 3], 3),
            ([poll(made.id) + health], 2),
            ([poll(made.id)[:40], poll(made.id)[40:]], 1),
            ([health[:40], health[40:] + poll(made.id)], 2),
        ):
            for part in sent:
                client.sendall(part)
                time.sleep(0.02)
            for _ in range(num_answers):
                assert found.readline() == b"HTTP/1.1 200 OK\r\n"
                headers = dict(line.rstrip().split(b": ", 1) for line in iter(found.readline, b"\r\n"))
                json.loads(found.read(int(headers[b"content-length"])))


def test_only_plain_polls_are_taken(service: tuple[Service, int]) -> None:
    running, _ = service
    polls = Polls(running, make_app(running).state.gate)
    made = batch()
    running.store.put(made)
    plain = "User-Agent: a\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\nX-Stainless-OS: x\r\n"
    assert polls.answer(poll(made.id, plain), ()) is not None
    refused = [
        poll(made.id, "Content-Length: 2\r\n"),
        poll(made.id, "Transfer-Encoding: chunked\r\n"),
        poll(made.id, "Connection: close\r\n"),
        poll(made.id, "Expect: 100-continue\r\n"),
        poll(made.id, "Upgrade: h2c\r\n"),
        poll(made.id, "Host: localhost\r\n"),
        poll(made.id, "X-Other: 1\r\n"),
        poll(made.id, "Accept: a\r\n folded\r\n"),
        poll(made.id, "Accept: a\x01\r\n"),
        poll(made.id, method="HEAD"),
        poll(made.id, method="POST"),
        poll(made.id + "?a=1"),
        poll("batch_" + "0" * 32),
        poll(made.id) + b"x",
        poll(made.id) * 2,
        poll(made.id)[:-2],
        poll(made.id).replace(b"Host: localhost\r\n", b""),
        poll(made.id).replace(b"localhost", b"elsewhere.example"),
        poll(made.id).replace(b"HTTP/1.1", b"HTTP/1.0"),
        poll(made.id, "A: b\r\n" * 50),
        b"",
    ]
    assert [request for request in refused if polls.answer(request, ()) is not None] == []


def test_a_poll_needs_the_key_of_the_batch(tmp_path: Path) -> None:
    running = Service(settings_for(tmp_path / "data", NO_SERVER))
    key, secret = KeyFile(tmp_path / "data").add("alice")
    _, other = KeyFile(tmp_path / "data").add("bob")
    with listening(running) as port:
        made = batch(key.id)
        running.store.put(made)
        for headers, status in (
            (f"Authorization: Bearer {secret}\r\n", b"200 OK"),
            (f"Authorization: Bearer {other}\r\n", b"404 Not Found"),
            ("Authorization: Bearer bsk-none\r\n", b"401 Unauthorized"),
            ("", b"401 Unauthorized"),
        ):
            assert answer_of(exchange(port, poll(made.id, headers), end=b"}"))[0] == b"HTTP/1.1 " + status
        KeyFile(tmp_path / "data").revoke("alice")
        found = exchange(port, poll(made.id, f"Authorization: Bearer {secret}\r\n"), end=b"}")
        assert answer_of(found)[0] == b"HTTP/1.1 401 Unauthorized"


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_the_api_gives_way_to_the_engine(tmp_path: Path) -> None:
    with service_process(tmp_path / "data", NO_SERVER) as service:
        (engine,) = service.engine_pids()
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, engine) == own
        assert os.getpriority(os.PRIO_PROCESS, service.process.pid) > own or own >= 19
