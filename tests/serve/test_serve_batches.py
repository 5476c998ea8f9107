"""Batches through the service, from upload to files, over a fake server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import CHAT, create, error_of, line, lines, rows_of, running, upload, wait_for
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with running(tmp_path_factory.mktemp("serve") / "data") as found:
        yield found


def test_a_batch_is_answered_and_its_output_is_in_the_order_of_the_input(client: TestClient) -> None:
    batch = create(client, upload(client, lines(40)), metadata={"run": "1"})
    assert batch["status"] == "validating"
    done = wait_for(client, batch["id"])
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert done["error_file_id"] is None
    assert done["metadata"] == {"run": "1"}
    assert done["model"] == "m"
    assert done["usage"]["total_tokens"] > 0
    rows = rows_of(client, done["output_file_id"])
    assert [row["custom_id"] for row in rows] == [f"id-{number}" for number in range(40)]
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in rows)
    for earlier, later in (("in_progress", "finalizing"), ("finalizing", "completed")):
        assert done[f"{earlier}_at"] <= done[f"{later}_at"]
    file = client.get(f"/v1/files/{done['output_file_id']}").json()
    assert file["purpose"] == "batch_output"
    assert file["filename"] == f"{batch['id']}_output.jsonl"


def test_lines_that_fail_go_to_the_error_file(client: TestClient) -> None:
    bad = line("bad", body={"stream": True})
    data = lines(3) + json.dumps(bad).encode() + b"\n"
    done = wait_for(client, create(client, upload(client, data))["id"])
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    (row,) = rows_of(client, done["error_file_id"])
    assert row["custom_id"] == "bad"
    assert row["response"]["status_code"] == 400


@pytest.mark.parametrize("url", ["/chat/completions", "https://host/v1/chat/completions/"])
def test_other_spellings_of_an_address_are_the_same_endpoint(client: TestClient, url: str) -> None:
    done = wait_for(client, create(client, upload(client, json.dumps(line("a", url=url)).encode()))["id"])
    assert done["request_counts"]["completed"] == 1


def test_a_batch_whose_lines_all_fail_is_completed(client: TestClient) -> None:
    data = b"".join(json.dumps(line(f"b{n}", body={"stream": True})).encode() + b"\n" for n in range(3))
    done = wait_for(client, create(client, upload(client, data))["id"])
    assert (done["status"], done["output_file_id"]) == ("completed", None)
    assert len(rows_of(client, done["error_file_id"])) == 3


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"{not json\n", "invalid_json_line", 1),
        (b"[]\n", "invalid_json_line", 1),
        (b"\n\n", "empty_file", None),
        (lines(1) * 2, "duplicate_custom_id", 2),
        (json.dumps(line("a", url="/v1/completions")).encode(), "url_mismatch", 1),
        (json.dumps(line("a", method="GET")).encode(), "invalid_method", 1),
        (
            json.dumps(
                line(
                    "",
                )
            ).encode(),
            "missing_required_parameter",
            1,
        ),
        (json.dumps(line("a", body={"model": "gpt-x"})).encode(), "model_not_found", 1),
        (json.dumps({**line("a"), "body": 3}).encode(), "invalid_json_line", 1),
    ],
)
def test_a_file_that_makes_no_batch_fails_with_errors_by_line(
    client: TestClient, data: bytes, code: str, number: int | None
) -> None:
    done = wait_for(client, create(client, upload(client, data))["id"])
    assert done["status"] == "failed"
    assert done["errors"]["object"] == "list"
    error = done["errors"]["data"][0]
    assert (error["code"], error["line"]) == (code, number)
    assert done["failed_at"] is not None
    assert done["output_file_id"] is done["error_file_id"] is None


def test_what_a_batch_must_have(client: TestClient) -> None:
    file_id = upload(client, lines(1))
    good = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"completion_window": "9999d"}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ):
        assert error_of(client.post("/v1/batches", json={**good, **change}), 400)["param"] == param
    error_of(client.post("/v1/batches", json={**good, "input_file_id": "file_none"}), 404)
    for body in (b"", b"{", b"[]", b'{"a": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}'):
        error_of(client.post("/v1/batches", content=body), 400)


def test_the_same_request_within_a_minute_is_the_same_batch(client: TestClient) -> None:
    file_id = upload(client, lines(2))
    first = create(client, file_id)
    assert create(client, file_id)["id"] == first["id"]
    assert create(client, file_id, window="12h")["id"] != first["id"]


def test_an_idempotency_key_names_one_batch(client: TestClient) -> None:
    file_id, headers = upload(client, lines(2)), {"Idempotency-Key": "k1"}
    first = create(client, file_id, metadata={"a": "1"}, headers=headers)
    assert create(client, file_id, metadata={"a": "1"}, headers=headers)["id"] == first["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h"}
    assert error_of(client.post("/v1/batches", json=body, headers=headers), 400)["code"] == "idempotency_error"


def test_lists_go_back_in_time_page_by_page(client: TestClient) -> None:
    file_id = upload(client, lines(1))
    ids = [create(client, file_id, metadata={"n": str(n)})["id"] for n in range(5)]
    first = client.get("/v1/batches?limit=2").json()
    assert [batch["id"] for batch in first["data"]] == ids[:2:-1]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[4], ids[3])
    rest = client.get(f"/v1/batches?limit=100&after={ids[3]}").json()
    assert [batch["id"] for batch in rest["data"]][:3] == ids[2::-1]
    assert not rest["has_more"]
    for query in ("limit=0", "limit=101", "limit=x", "limit=²"):
        assert error_of(client.get(f"/v1/batches?{query}"), 400)["param"] == "limit"
    error_of(client.get("/v1/batches?after=batch_none"), 404)


def test_cancelling_keeps_what_is_done_and_gives_every_line_one_row(tmp_path: Path) -> None:
    with running(tmp_path / "data", latency_s=0.2) as client:
        batch = create(client, upload(client, lines(600)))
        wait_for(client, batch["id"], "in_progress")
        while not client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"]:
            pass
        assert client.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "cancelling"
        done = wait_for(client, batch["id"])
        assert done["status"] == "cancelled"
        outputs, errors = rows_of(client, done["output_file_id"]), rows_of(client, done["error_file_id"])
        assert 0 < len(outputs) < 600
        assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
        assert {row["custom_id"] for row in outputs + errors} == {f"id-{number}" for number in range(600)}
        assert len(outputs) + len(errors) == 600
        assert done["request_counts"] == {"total": 600, "completed": len(outputs), "failed": len(errors)}
        assert error_of(client.post(f"/v1/batches/{batch['id']}/cancel"), 400)["param"] == "id"
        after = create(client, upload(client, lines(3, "later")))
        assert wait_for(client, after["id"])["status"] == "completed"


def test_rows_can_be_read_while_a_batch_runs(tmp_path: Path) -> None:
    with running(tmp_path / "data", latency_s=0.1) as client:
        batch = create(client, upload(client, lines(400)))
        rows: list[bytes] = []
        while not rows:
            reply = client.get(f"/v1/batches/{batch['id']}/output")
            rows = reply.content.splitlines()
        assert reply.headers["X-Incomplete"] == "true"
        assert all(json.loads(row)["custom_id"].startswith("id-") for row in rows)
        done = wait_for(client, batch["id"])
        whole = client.get(f"/v1/batches/{batch['id']}/output")
        assert "X-Incomplete" not in whole.headers
        assert whole.content == client.get(f"/v1/files/{done['output_file_id']}/content").content


def test_deleting_a_batch_deletes_its_files(client: TestClient) -> None:
    done = wait_for(client, create(client, upload(client, lines(2)))["id"])
    assert client.delete(f"/v1/batches/{done['id']}").json() == {"id": done["id"], "object": "batch", "deleted": True}
    error_of(client.get(f"/v1/batches/{done['id']}"), 404)
    error_of(client.get(f"/v1/files/{done['output_file_id']}"), 404)
    assert not list(Path(client.app.state.service.settings.data, "files").glob(done["output_file_id"]))  # type: ignore[attr-defined]
