"""Webhooks: what is sent, what it is signed with, and where it is never sent."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import create, lines, running, upload, wait_for, wait_until

from blendserve.errors import ConfigError
from blendserve.serve.settings import WebhookSettings
from blendserve.serve.webhooks import NotDeliveredError, is_public, parse_url, post, secret_bytes

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


class Receiver(HTTPServer):
    """Answers with the statuses that it is given, then with 200, and remembers what came."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = list(statuses)
        self.received: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?a=1"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((dict(self.headers.items()), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@contextmanager
def receiver(*statuses: int) -> Iterator[Receiver]:
    with Receiver(*statuses) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_end_of_a_batch_is_told_and_the_sdk_believes_it(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package")
    with (
        receiver() as hook,
        running(tmp_path / "data", webhook=WebhookSettings(hook.url, SECRET, allows_private=True)) as client,
    ):
        good, bad = create(client, upload(client, lines(2))), create(client, upload(client, b"{"))
        wait_for(client, good["id"])
        wait_for(client, bad["id"])
        wait_until(lambda: len(hook.received) == 2)
        with openai.OpenAI(api_key="none", webhook_secret=SECRET) as sdk:
            events = [sdk.webhooks.unwrap(body, headers) for headers, body in hook.received]
            headers, body = hook.received[0]
            with pytest.raises(openai.InvalidWebhookSignatureError):
                sdk.webhooks.unwrap(body + b" ", headers)
        found = {event.type: event.data.id for event in events}
        assert found == {"batch.completed": good["id"], "batch.failed": bad["id"]}
        assert b"what is" not in body


def test_a_delivery_that_fails_is_tried_again(tmp_path: Path) -> None:
    offset = 0.0
    with (
        receiver(500, 302) as hook,
        running(
            tmp_path / "data",
            webhook=WebhookSettings(hook.url, SECRET, allows_private=True),
            clock=lambda: time.time() + offset,
        ) as client,
    ):
        wait_for(client, create(client, upload(client, lines(1)))["id"])
        for number in range(1, 4):
            wait_until(lambda number=number: len(hook.received) == number)  # type: ignore[misc]
            offset += 60.0
        ids = {headers["webhook-id"] for headers, _ in hook.received}
        assert len(ids) == 1
        assert len({body for _, body in hook.received}) == 1
        assert json.loads(hook.received[0][1])["type"] == "batch.completed"


def test_private_addresses_are_refused() -> None:
    with receiver() as hook:
        with pytest.raises(NotDeliveredError, match="private network"):
            post(parse_url(hook.url), b"{}", {}, allows_private=False)
        with pytest.raises(NotDeliveredError, match="private network"):
            post(parse_url(f"http://localhost:{hook.server_port}"), b"{}", {}, allows_private=False)
        assert hook.received == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "2002:7f00:1::",
        "64:ff9b:1::1",
    ],
)
def test_which_addresses_are_private(address: str) -> None:
    assert not is_public(address)


def test_which_addresses_are_public() -> None:
    assert is_public("1.1.1.1")
    assert is_public("2606:4700::1111")


@pytest.mark.parametrize("url", ["ftp://a/b", "https://", "https://u:p@a/", "https://a:99999/", "a", "http://a:0/"])
def test_urls_to_which_nothing_can_be_sent(url: str) -> None:
    with pytest.raises(ConfigError, match="--webhook is"):
        parse_url(url)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!", "abc", "whsec_" + base64.b64encode(b"short").decode()])
def test_secrets_that_are_none(secret: str) -> None:
    with pytest.raises(ConfigError, match="secret for webhooks"):
        secret_bytes(secret)
