"""Nothing that comes out of a file, a model or a server moves the cursor, changes the title or forges a line."""

from __future__ import annotations

import http.server
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.report.format import printable, printable_line

EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b\u202e\r\nblendserve: all is well\n"
LIMITS = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2", "--quiet"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_directory(tmp_path / "tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    def line(custom_id: str, body: Any, **fields: Any) -> str:
        content = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **fields}
        return json.dumps(content) + "\n"

    lines = [
        line(EVIL, {"prompt": "the", "max_tokens": 1, "model": EVIL}),
        line("b", {"prompt": "the", "max_tokens": 1, EVIL: 1}),
        line("c", {"prompt": EVIL, "max_tokens": 1}),
        line("d", {"prompt": EVIL, "max_tokens": 1, "temperature": EVIL}),
        line(EVIL, {"prompt": "the"}, url=EVIL),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(lines))
    return path


def assert_harmless(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    text = found.out + found.err
    assert not [character for character in text if character != "\n" and not character.isprintable()]
    assert not [line for line in text.splitlines() if line.startswith("blendserve: all")]
    return text


def test_what_is_escaped() -> None:
    assert printable("a\x1b[2J\x9b\u202eé\n東") == "a\\x1b[2J\\x9b\\u202eé\n東"
    assert printable_line("a\nb\r") == "a\\nb\\r"


def test_lines(tiny: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tiny)]
    assert main(["check", str(source), *model]) == 1
    assert "pwned" in assert_harmless(capsys)
    assert main(["run", str(source), "-o", str(tmp_path / "out.jsonl"), *model, *LIMITS]) == 3
    assert "The file asks for \\x1b]0;pwned" in assert_harmless(capsys)
    assert main(["plan", str(source), *model, "--hardware", "a100-80g"]) == 0
    assert_harmless(capsys)


def test_templates(tiny: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    for template in ("{{ raise_exception(" + json.dumps(EVIL) + ") }}", "{% " + EVIL + " %}"):
        (tiny / "chat_template.jinja").write_text(template)
        assert main(["check", str(source), "--model", str(tiny)]) == 1
        assert "template" in assert_harmless(capsys)


def test_tensor_names(tiny: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header[EVIL] = header.pop("lm_head.weight")
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + content[8 + length :])
    assert main(["check", str(source), "--model", str(tiny)]) == 1
    assert "is unexpected" in assert_harmless(capsys)


@pytest.fixture
def server() -> Iterator[str]:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": {"message": EVIL, "code": EVIL}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()
        thread.join()


def test_servers(source: Path, tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "out.jsonl"), "--quiet"]
    assert main(["run", str(source), *output, "--engine", "http", "--base-url", server]) == 1
    assert "HTTP 401: \\x1b]0;pwned" in assert_harmless(capsys)
