"""`blendserve run --replicas N` on a Ray that is started for the run: bound to loopback, and gone after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_cases import batch_file, comparable
from ray_cases import processes_of
from tiny_files import tiny_directory

from blendserve.cli import main

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")

LIMITS = ("--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "1")
REPLICAS = ("--replicas", "2", "--replica-cpus", "0")  # so that a machine with one core will do


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def native(tiny: Path, source: Path, output: Path, *extra: str) -> list[str]:
    return ["run", str(source), "-o", str(output), "--model", str(tiny), *LIMITS, *extra]


def ray_sessions() -> set[str]:
    return {str(path) for path in (Path(tempfile.gettempdir()) / "ray").glob("session_2*")}


@pytest.fixture
def session_is_gone() -> Iterator[None]:
    """Asserts that what a test has started is over, and that it listened to this machine alone."""
    before = ray_sessions()
    yield
    (session,) = ray_sessions() - before
    for _ in range(100):
        if not (left := processes_of(session)):
            break
        time.sleep(0.1)
    assert not left


def listening_addresses(session: str) -> set[str]:
    """Hexadecimal addresses on which the processes of a session accept TCP connections."""
    sockets = set()
    for process in processes_of(session):
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


def environment_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")


@pytest.mark.usefixtures("session_is_gone")
def test_a_terminated_driver_stops_in_good_order_and_listens_to_this_machine_alone(tiny: Path, tmp_path: Path) -> None:
    source, output = batch_file(tmp_path / "in.jsonl", num_lines=80), tmp_path / "out.jsonl"
    before = ray_sessions()
    command = [sys.executable, "-m", "blendserve", *native(tiny, source, output, "--quiet", *REPLICAS)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    records = tmp_path / "out.jsonl.journal" / "records"
    while process.poll() is None and not (records.exists() and records.stat().st_size > 4000):
        time.sleep(0.02)
    (session,) = ray_sessions() - before
    addresses = listening_addresses(session)
    has_token = ["RAY_AUTH_MODE=token" in environment_of(process) for process in processes_of(session)]
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "interrupted: " in error
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert has_token
    assert all(has_token)
    assert addresses
    assert addresses <= loopback
    assert main(native(tiny, source, output, "--quiet")) == 3, "the journal is that of any run; two lines are wrong"
    assert len(comparable(output)) == 78
