"""Tables behind URLs of other kinds: the Hugging Face hub, the web, and Google's storage, each from a server here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_fakes import PROMPT, TableEngine, run_map, table_of, write_parquet

from blendserve.errors import ConfigError
from blendserve.tables.mapping import open_table

REPO = "/api/datasets/me/reviews"
BY_ID = replace(PROMPT, id_column="id")
"""Names of rows are their seeds, and file names differ here."""


class _Files(BaseHTTPRequestHandler):
    """Serves `server.files` by path, also in parts, and a data set of the hub that holds those below `data/`."""

    server: _Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == REPO:
            self._answer({"id": "me/reviews", "sha": "0" * 40, "private": False, "disabled": False})
        elif path.startswith(f"{REPO}/tree/main"):
            is_root = path == f"{REPO}/tree/main" and "recursive=true" not in self.path.lower()
            files = [_entry(name, data) for name, data in self.server.files.items()]
            self._answer([{"type": "directory", "path": "data", "oid": "1"}] if is_root else files)
        else:
            self._send_file(path.removeprefix("/datasets/me/reviews/resolve/main").strip("/"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tell nobody."""

    def _send_file(self, name: str) -> None:
        data = self.server.files.get(name)
        if data is None:
            self.send_error(404)
            return
        begin, end, status = 0, len(data), 200
        if (given := self.headers.get("Range")) is not None:
            first, last = given.removeprefix("bytes=").split("-")
            begin, end, status = int(first), min(int(last or end) + 1, end), 206
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{hash(data)}"', "X-Repo-Commit": "0" * 40}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._send(status, data[begin:end], headers)

    def _answer(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.files = files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data):040d}"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    files = {}
    for at in range(2):
        path = write_parquet(tmp_path / "part.parquet", table_of(20).slice(at * 10, 10))
        files[f"data/part-{at}.parquet"] = path.read_bytes()
    serving = _Server(files)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


def answered(sources: list[str], output: Path) -> Any:
    """The table of these URLs with its answers."""
    run_map([*sources], output, BY_ID)  # type: ignore[list-item]
    return pq.read_table(output)


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """What comes of the same rows in one file of this machine."""
    run_map(write_parquet(tmp_path / "all.parquet", table_of(20)), tmp_path / "whole.parquet", BY_ID)
    return pq.read_table(tmp_path / "whole.parquet")


def test_a_data_set_of_the_hub_is_a_table(
    server: _Server, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Hugging Face's own file system, which asks a hub of this machine."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
    for source in ("hf://datasets/me/reviews/data/*.parquet", "hf://datasets/me/reviews/data"):
        found = answered([source], tmp_path / f"out-{len(source)}.parquet")
        assert found.equals(whole)
    with pytest.raises(ConfigError, match=r"cannot read hf://datasets/me/reviews/data/no.parquet"):
        open_table("hf://datasets/me/reviews/data/no.parquet")


def test_a_file_of_the_web_is_a_table(server: _Server, whole: Any, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    urls = [f"{server.url}/data/part-{at}.parquet" for at in range(2)]
    found = answered(urls, tmp_path / "out.parquet")
    assert found.equals(whole)
    with pytest.raises(ConfigError, match="there is no such file"):
        open_table(f"{server.url}/data/no.parquet")
    engine = TableEngine()
    changed = write_parquet(tmp_path / "part.parquet", pa.concat_tables([table_of(20).slice(10, 10), table_of(1)]))
    server.files["data/part-1.parquet"] = changed.read_bytes()
    fsspec.filesystem("http").clear_instance_cache()
    report = run_map([*urls], tmp_path / "out.parquet", BY_ID, engine)  # type: ignore[list-item]
    assert (report.num_lines, engine.fake.num_answers) == (21, 1)
