"""A disk that is really full, and one that is really read-only: what clients are told, and that batches go on later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import client_of, create, error_of, lines, rows_of, running, settings_for, upload, wait_for, wait_until

from blendserve.errors import ConfigError
from blendserve.serve import batches as batches_module
from blendserve.serve.service import Service

_BYTES = 6 << 20


def _mount(*words: str) -> bool:
    mount = shutil.which("mount")
    return mount is not None and subprocess.run([mount, *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or not _mount("-t", "tmpfs", "-o", f"size={_BYTES}", "tmpfs", str(place)):
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all the space that is left."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


def test_a_file_that_does_not_fit_is_refused_and_leaves_nothing(disk: Path) -> None:
    with client_of(settings_for(disk / "data", "http://127.0.0.1:9/v1")) as client:
        reply = client.post("/v1/files", files={"file": ("a", b"x" * (_BYTES + 1))}, data={"purpose": "batch"})
        assert error_of(reply, 507)["code"] == "no_space"
        assert list((disk / "data" / "partial").iterdir()) == []
        assert list((disk / "data" / "files").iterdir()) == []
        assert client.get("/v1/files").json()["data"] == []
        filler = fill(disk)
        reply = client.post("/v1/files", files={"file": ("a", lines(3))}, data={"purpose": "batch"})
        assert error_of(reply, 507)["code"] == "no_space"
        assert client.get("/v1/files").json()["data"] == []
        filler.unlink()
        assert client.get(f"/v1/files/{upload(client, lines(3))}/content").content == lines(3)


def test_a_batch_goes_on_when_there_is_space_again(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_RETRY_S", 0.1)
    with running(disk / "data", latency_s=0.02) as client:
        file = upload(client, lines(600))
        batch = create(client, file)
        wait_until(lambda: bool(client.get(f"/v1/batches/{batch['id']}/output").content))
        filler = fill(disk)
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "7d"}
        replies = [client.post("/v1/batches", json={**body, "metadata": {"n": str(n)}}) for n in range(40)]
        assert {reply.status_code for reply in replies} <= {200, 507}
        assert error_of(replies[-1], 507)["code"] == "no_space"
        wait_until(lambda: client.app.state.service.scheduler.trouble is not None)  # type: ignore[attr-defined]
        assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
        filler.unlink()
        for reply in replies:
            if reply.status_code == 200:
                assert wait_for(client, reply.json()["id"])["status"] == "completed"
        done = wait_for(client, batch["id"])
        assert done["status"] == "completed"
        assert [row["custom_id"] for row in rows_of(client, done["output_file_id"])] == [f"id-{n}" for n in range(600)]


def test_a_disk_that_becomes_read_only_is_said_and_may_come_back(disk: Path) -> None:
    with running(disk / "data") as client:
        upload(client, lines(2))
        partial = str(disk / "data" / "partial")
        assert _mount("--bind", partial, partial)
        try:
            assert _mount("-o", "remount,bind,ro", partial)
            reply = client.post("/v1/files", files={"file": ("a", lines(3))}, data={"purpose": "batch"})
            assert "Read-only" in error_of(reply, 500)["message"]
            assert client.get("/health/live").status_code == 200
        finally:
            subprocess.run(["umount", partial], check=True)
        assert wait_for(client, create(client, upload(client, lines(3)))["id"])["status"] == "completed"


def test_a_service_does_not_start_where_it_cannot_write(disk: Path) -> None:
    assert _mount("-o", "remount,ro", str(disk))
    with pytest.raises(ConfigError, match=r"cannot write in .*Read-only"):
        Service(settings_for(disk / "data", "http://127.0.0.1:9/v1"))


def test_a_service_starts_on_a_full_disk_once_there_is_room(disk: Path) -> None:
    settings = settings_for(disk / "data", "http://127.0.0.1:9/v1")
    filler = fill(disk)
    with pytest.raises(ConfigError, match=r"full|space"):
        Service(settings)
    filler.unlink()
    with client_of(settings) as client:
        assert json.loads(client.get("/v1/files").text)["data"] == []
