"""A service as a process of its own, which tests may kill."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

MAX_START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServiceProcess:
    """`blendserve serve` on a data directory; its engine asks the server at `base_url`. It speaks TLS where options say
    so, which `trusted` can verify.
    """

    def __init__(
        self, data: Path, base_url: str, *options: str, port: int | None = None, trusted: ssl.SSLContext | None = None
    ) -> None:
        self.port = port or free_port()
        self._trusted = trusted
        self.log = data.parent / f"{data.name}.log"
        self._command = [
            *(sys.executable, "-m", "blendserve", "serve", "--data", str(data), "--port", str(self.port)),
            *("--engine", "http", "--base-url", base_url, "--model", "m", "--min-free", "0", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._trusted else 'http'}://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + MAX_START_S
        while True:
            with suppress(httpx2.TransportError):
                httpx2.get(f"{self.url}/health/live", verify=self._trusted or True)
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def engine_pids(self) -> list[int]:
        """Children of the service: the engine process, where there is one."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                        found.append(int(entry.name))
        return found

    def kill(self, *, engine: bool = True, service: bool = True) -> None:
        """kill -9 of one or both."""
        pids = (self.engine_pids() if engine else []) + ([self.process.pid] if service else [])
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if service:
            self.process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(20)


@contextmanager
def service_process(
    data: Path, base_url: str, *options: str, trusted: ssl.SSLContext | None = None
) -> Iterator[ServiceProcess]:
    service = ServiceProcess(data, base_url, *options, trusted=trusted)
    try:
        yield service
    finally:
        service.stop()
