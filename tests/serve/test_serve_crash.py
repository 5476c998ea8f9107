"""kill -9 of the service, of its engine process, and of both: every line once, no batch stuck, the same files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import CHAT, line, settings_for, wait_until
from serve_process import service_process

from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.errors import ConfigError
from blendserve.serve.engine_host import end_group, end_leftovers
from blendserve.serve.service import Service

VICTIMS: tuple[dict[str, bool], ...] = ({"engine": False}, {"service": False}, {})
"""What a kill spares."""


def batch_bytes(number: int, num_lines: int) -> bytes:
    rows = [json.dumps(line(f"b{number}-{row}", body={"max_tokens": 1 + row % 5})) for row in range(num_lines)]
    rows[::7] = [json.dumps(line(f"b{number}-bad{row}", body={"stream": True})) for row in range(0, num_lines, 7)]
    return "\n".join(rows).encode()


def submit(url: str, num_batches: int, num_lines: int) -> list[str]:
    ids = []
    for number in range(num_batches):
        files = {"file": (f"{number}.jsonl", batch_bytes(number, num_lines))}
        file_id = httpx2.post(f"{url}/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        ids.append(httpx2.post(f"{url}/v1/batches", json=body).json()["id"])
    return ids


def ended(url: str, ids: list[str]) -> list[dict[str, object]]:
    found = {batch["id"]: batch for batch in httpx2.get(f"{url}/v1/batches?limit=100").json()["data"]}
    return [found[id] for id in ids if found[id]["status"] not in ("validating", "in_progress", "finalizing")]


def files_of(url: str, batches: list[dict[str, object]]) -> list[bytes]:
    """Output and error files, without the time at which a batch was made."""
    ids = [batch[field] for batch in batches for field in ("output_file_id", "error_file_id")]
    return [httpx2.get(f"{url}/v1/files/{id}/content").content for id in ids]


def run_killed(
    tmp_path: Path, *, num_kills: int, num_batches: int, num_lines: int, latency_s: float, seed: int
) -> None:
    moments = random.Random(seed)
    with serving(FakeSettings(latency_s=latency_s)) as server:
        with service_process(tmp_path / "whole", server.base_url) as whole:
            ids = submit(whole.url, num_batches, num_lines)
            wait_until(lambda: len(ended(whole.url, ids)) == num_batches, 120)
            wanted = files_of(whole.url, ended(whole.url, ids))
        with service_process(tmp_path / "killed", server.base_url, "--max-inflight", "8") as killed:
            ids = submit(killed.url, num_batches, num_lines)
            for number in range(num_kills):
                time.sleep(moments.uniform(0.1, 1.5))
                spared = VICTIMS[number % len(VICTIMS)]
                killed.kill(**spared)
                if spared.get("service", True):
                    killed.start()
            wait_until(lambda: len(ended(killed.url, ids)) == num_batches, 120)
            batches = ended(killed.url, ids)
            assert {batch["status"] for batch in batches} == {"completed"}
            found = files_of(killed.url, batches)
            check_files(found, num_lines)
            assert found == wanted
            left = sorted(path.name for path in (tmp_path / "killed" / "batches").iterdir())
            assert left == []


def check_files(files: list[bytes], num_lines: int) -> None:
    for outputs, errors in zip(files[::2], files[1::2], strict=True):
        ids = Counter(json.loads(row)["custom_id"] for row in outputs.splitlines() + errors.splitlines())
        assert len(ids) == num_lines
        assert set(ids.values()) == {1}


def test_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    run_killed(tmp_path, num_kills=3, num_batches=3, num_lines=30, latency_s=0.03, seed=3)


@pytest.mark.thorough
def test_kills_at_thirty_moments_lose_and_repeat_nothing(tmp_path: Path) -> None:
    run_killed(tmp_path, num_kills=30, num_batches=20, num_lines=80, latency_s=0.1, seed=5)


def test_an_engine_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    with (
        serving(FakeSettings(latency_s=0.05)) as server,
        service_process(tmp_path / "data", server.base_url) as service,
    ):
        (id,) = submit(service.url, 1, 120)
        wait_until(lambda: bool(httpx2.get(f"{service.url}/v1/batches/{id}/output").content))
        service.kill(service=False)
        assert httpx2.get(f"{service.url}/health/live").status_code == 200
        wait_until(lambda: len(ended(service.url, [id])) == 1)
        (batch,) = ended(service.url, [id])
        assert batch["status"] == "completed"


def test_two_services_never_share_a_directory(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", "http://127.0.0.1:9/v1")
    first = Service(settings)
    with pytest.raises(ConfigError, match="is in use by another service"):
        Service(settings)
    first.close()
    Service(settings).close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_leader_alive", [False, True])
def test_what_a_dead_engine_process_has_started_is_ended(is_leader_alive: bool) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '1000']).pid, flush=True)"
    waiting = "; sys.stdin.read()" if is_leader_alive else ""
    command = [sys.executable, "-c", code + waiting]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, process_group=0, **pipes) as leader:  # type: ignore[call-overload]
        child = int(leader.stdout.readline())
        if not is_leader_alive:
            leader.wait()
        end_leftovers(leader.pid)
        if is_leader_alive:
            assert Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"
            end_group(leader.pid)
        wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())
