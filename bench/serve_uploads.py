"""Memory of the service while large files come in: its resident memory must not follow their size.

python bench/serve_uploads.py
python bench/serve_uploads.py --megabytes 200 2000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import httpx2
from serve_load import service

_CHUNK = b'{"custom_id": "x", "padding": "' + b"a" * ((1 << 20) - 40) + b'"}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    arguments = parser.parse_args()
    common.print_header()
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name) / "data", ["--engine", "http", "--base-url", "http://127.0.0.1:9/v1"]) as url,
    ):
        pid = int((Path(name) / "data" / "service.lock").read_text())
        before = resident_bytes(pid)
        for megabytes in arguments.megabytes:
            started = time.perf_counter()
            file = upload(url, megabytes)
            seconds = time.perf_counter() - started
            grown = peak_bytes(pid) - before
            speed = f"{seconds:.1f} s, {megabytes / seconds:.0f} MB/s"
            print(f"{megabytes} MB: {speed}, peak {grown / 1e6:.1f} MB above {before / 1e6:.0f} MB")
            httpx2.delete(f"{url}/v1/files/{file}")


def upload(url: str, megabytes: int) -> str:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
        for _ in range(megabytes):
            yield _CHUNK
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = httpx2.post(f"{url}/v1/files", content=body(), headers=headers, timeout=600)
    reply.raise_for_status()
    id: str = reply.json()["id"]
    return id


def resident_bytes(pid: int) -> int:
    return _status(pid, "VmRSS:")


def peak_bytes(pid: int) -> int:
    return _status(pid, "VmHWM:")


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise LookupError(name)


if __name__ == "__main__":
    main()
