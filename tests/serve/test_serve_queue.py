"""The queue at work: shares of keys, forecasts, windows that cannot be met, an engine that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import (
    CHAT,
    client_of,
    create,
    error_of,
    lines,
    running,
    settings_for,
    upload,
    wait_for,
    wait_until,
)
from serve_process import free_port
from starlette.testclient import TestClient

from blendserve import HttpSettings, NativeSettings
from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.serve import scheduler
from blendserve.serve.keys import KeyFile
from blendserve.serve.settings import ModelChoice


def scheduler_of(client: TestClient) -> scheduler.Scheduler:
    found: scheduler.Scheduler = client.app.state.service.scheduler  # type: ignore[attr-defined]
    return found


def test_a_key_that_comes_later_gets_its_share_while_another_ones_batch_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_MIN_ROUND_S", 0.0)
    monkeypatch.setattr(scheduler, "_CHECK_S", 0.1)
    (tmp_path / "data").mkdir()
    alice, bob = ({"Authorization": f"Bearer {KeyFile(tmp_path / 'data').add(name)[1]}"} for name in ("alice", "bob"))
    with running(tmp_path / "data", latency_s=0.3, round_s=0.5) as client:
        large = create(client, upload(client, lines(3000), headers=alice), headers=alice)
        path = f"/v1/batches/{large['id']}/output"
        wait_until(lambda: bool(client.get(path, headers=alice).content))
        small = create(client, upload(client, lines(5), headers=bob), headers=bob)
        assert wait_for(client, small["id"], headers=bob)["status"] == "completed"
        assert client.get(f"/v1/batches/{large['id']}", headers=alice).json()["status"] == "in_progress"


def test_a_batch_in_danger_is_flagged(tmp_path: Path) -> None:
    with running(tmp_path / "data", latency_s=2.0) as client:
        scheduler_of(client).tally.rates["m"] = 0.01
        batch = create(client, upload(client, lines(200)), window="5m")
        wait_for(client, batch["id"], "in_progress")
        found: dict[str, Any] = {}

        def is_known() -> bool:
            found.update(client.get(f"/v1/batches/{batch['id']}").json()["blendserve"])
            return found["expected_end_at"] is not None

        wait_until(is_known)
        assert found["is_in_danger"]
        assert "may be late" in client.get("/", headers={"Accept": "text/html"}).text


def test_a_window_that_cannot_be_met_is_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    with running(tmp_path / "data", refuses_late=True) as client:
        file_id = upload(client, lines(100))
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1m"}
        scheduler_of(client).tally.rates["m"] = 0.01
        error = error_of(client.post("/v1/batches", json=body), 429)
        assert "about 167 minutes" in error["message"]
        scheduler_of(client).tally.rates["m"] = 1000.0
        assert client.post("/v1/batches", json=body).status_code == 200


def test_an_engine_that_never_opens_is_said_and_batches_can_be_cancelled(tmp_path: Path) -> None:
    models = (ModelChoice("m", NativeSettings(model=str(tmp_path / "nothing"))),)
    with client_of(settings_for(tmp_path / "data", "", models=models)) as client:
        wait_until(lambda: scheduler_of(client).trouble is not None)
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert "nothing" in ready.json()["reason"]
        batch = create(client, upload(client, lines(3)))
        wait_for(client, batch["id"], "in_progress")
        client.post(f"/v1/batches/{batch['id']}/cancel")
        done = wait_for(client, batch["id"])
        assert (done["status"], done["request_counts"]["failed"]) == ("cancelled", 3)


@pytest.mark.thorough
def test_a_batch_on_which_the_engine_always_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_MAX_BACKOFF_S", 0.01)
    with running(tmp_path / "data", latency_s=30.0) as client:
        batch = create(client, upload(client, lines(3)))
        for _ in range(scheduler.MAX_FAILURES):
            wait_until(lambda: batch["id"] in scheduler_of(client).running_ids and scheduler_of(client).is_ready)
            scheduler_of(client).host.kill()
            wait_until(lambda: batch["id"] not in scheduler_of(client).running_ids)
        done = wait_for(client, batch["id"])
        assert done["status"] == "failed"
        assert done["errors"]["data"][0]["code"] == "engine_failed"
        assert done["request_counts"]["failed"] == 3


def test_a_server_that_is_down_costs_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_MAX_BACKOFF_S", 0.01)
    port = free_port()
    engine = HttpSettings(base_url=f"http://127.0.0.1:{port}/v1", model="m", max_attempts=1, max_outage_s=0.01)
    settings = settings_for(tmp_path / "data", "", models=(ModelChoice("m", engine),))
    with client_of(settings) as client:
        batch = create(client, upload(client, lines(3)))
        wait_until(lambda: scheduler_of(client)._num_rounds > scheduler.MAX_FAILURES + 2)
        with serving(FakeSettings(), port=port):
            assert wait_for(client, batch["id"])["request_counts"]["completed"] == 3


def test_metrics_are_those_of_prometheus(tmp_path: Path) -> None:
    with running(tmp_path / "data") as client:
        wait_for(client, create(client, upload(client, lines(3)))["id"])
        text = client.get("/metrics").text
        assert "blendserve_batches_ended_total 1.0" in text
        assert 'blendserve_batches{status="in_progress"} 0.0' in text
        assert "blendserve_tokens_total" in text
