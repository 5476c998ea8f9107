"""A server as a process of its own, for benches that ask it by HTTP."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2


@contextmanager
def server(
    command: Sequence[str], health_url: str, log_path: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Start the command and wait until `health_url` is well; it is ended behind. `environment` is added to ours.

    Raises: SystemExit with the end of its log where it ends before.
    """
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environment or {})})
    try:
        while not _is_well(health_url):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended: {log_path.read_text()[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def _is_well(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False
