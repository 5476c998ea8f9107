"""The service on the native engine with a tiny model: the answers of `blendserve run`, planned across batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import CHAT, client_of, create, error_of, rows_of, settings_for, upload, wait_for, wait_until
from starlette.testclient import TestClient
from tiny_files import tiny_directory

from blendserve import NativeSettings, run_batch
from blendserve.models.chat_settings import ChatSettings
from blendserve.serve.settings import ModelChoice

SHARED = "the answer to the question is in the text that the user gave before " * 6
LIMITS: dict[str, Any] = {
    "chat": ChatSettings(tool_format="hermes"),
    "kv_memory_bytes": 4 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_threads": 2,
}


def tiny_line(custom_id: str, model: str = "tiny") -> dict[str, Any]:
    messages = [{"role": "system", "content": SHARED}, {"role": "user", "content": f"what is {custom_id}?"}]
    body = {"model": model, "messages": messages, "max_tokens": 6}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def tiny_lines(count: int, prefix: str, model: str = "tiny") -> bytes:
    return b"".join(json.dumps(tiny_line(f"{prefix}-{n}", model)).encode() + b"\n" for n in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[TestClient]:
    models = tuple(ModelChoice(name, NativeSettings(model=str(model), **LIMITS)) for name in ("tiny", "other"))
    with client_of(settings_for(tmp_path_factory.mktemp("native") / "data", "", models=models)) as found:
        yield found


def without_cached(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        del row["response"]["body"]["usage"]["prompt_tokens_details"], row["response"]["body"]["created"]
        row["response"]["body"].pop("model")
    return rows


def test_answers_are_those_of_a_run_and_prefixes_are_shared_across_batches(
    client: TestClient, model: Path, tmp_path: Path
) -> None:
    scheduler = client.app.state.service.scheduler  # type: ignore[attr-defined]
    before, rounds_before = dict(scheduler.tally.num_tokens), scheduler._num_rounds
    scheduler._retry_at = float("inf")  # as after a failure of the engine: all batches wait
    ids = [create(client, upload(client, tiny_lines(5, f"b{n}")))["id"] for n in range(4)]
    for id in ids:
        wait_for(client, id, "in_progress")
    scheduler._retry_at = 0.0
    batches = [wait_for(client, id) for id in ids]
    assert {batch["status"] for batch in batches} == {"completed"}
    merged, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    merged.write_bytes(b"".join(tiny_lines(5, f"b{n}") for n in range(4)))
    merged_run = run_batch(merged, answers, engine=NativeSettings(model=str(model), **LIMITS), ordered=True)
    wanted = without_cached([json.loads(row) for row in answers.read_text().splitlines()])
    found = without_cached([row for batch in batches for row in rows_of(client, batch["output_file_id"])])
    for ours, theirs in zip(found, wanted, strict=True):  # ids hold the number of the line
        assert ours["custom_id"] == theirs["custom_id"]
        assert ours["response"]["body"]["choices"] == theirs["response"]["body"]["choices"]
        assert ours["response"]["body"]["usage"] == theirs["response"]["body"]["usage"]
    prompt, cached = (scheduler.tally.num_tokens[kind] - before.get(kind, 0) for kind in ("prompt", "cached"))
    assert scheduler._num_rounds == rounds_before + 1
    assert prompt - cached == merged_run.num_prompt_tokens - merged_run.num_cached_tokens


def test_models_take_turns(client: TestClient) -> None:
    ids = [create(client, upload(client, tiny_lines(2, name, name)))["id"] for name in ("tiny", "other", "tiny")]
    batches = [wait_for(client, id) for id in ids]
    assert [batch["status"] for batch in batches] == ["completed"] * 3
    assert [batch["model"] for batch in batches] == ["tiny", "other", "tiny"]
    (row, _) = rows_of(client, batches[1]["output_file_id"])
    assert row["response"]["body"]["model"] == "other"


def test_a_killed_engine_computes_the_same_answers(client: TestClient) -> None:
    host = client.app.state.service.scheduler.host  # type: ignore[attr-defined]
    data = tiny_lines(60, "kill")
    whole = wait_for(client, create(client, upload(client, data))["id"])
    again = create(client, upload(client, data))
    wait_until(lambda: bool(client.get(f"/v1/batches/{again['id']}/output").content))
    host.kill()
    done = wait_for(client, again["id"])
    assert done["status"] == "completed"
    rows = [without_cached(rows_of(client, batch["output_file_id"])) for batch in (whole, done)]
    assert rows[0] == rows[1]


CHAT_BODY = {"model": "tiny", "messages": [{"role": "user", "content": "the other one"}], "max_tokens": 12, "seed": 7}


def events_of(text: str) -> list[dict[str, Any]]:
    *found, last = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert last == "[DONE]"
    return [json.loads(event) for event in found]


def test_single_requests_get_the_answer_of_a_line(client: TestClient) -> None:
    row = tiny_line("one")
    row["body"] = CHAT_BODY
    done = wait_for(client, create(client, upload(client, json.dumps(row).encode()))["id"])
    (wanted,) = rows_of(client, done["output_file_id"])
    reply = client.post(CHAT, json=CHAT_BODY)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["choices"] == wanted["response"]["body"]["choices"]
    assert found["object"] == "chat.completion"
    assert found["usage"]["completion_tokens"] == wanted["response"]["body"]["usage"]["completion_tokens"]


@pytest.mark.parametrize("stop", [None, [" t", "e"]])
def test_streamed_pieces_add_up_to_the_answer(client: TestClient, stop: list[str] | None) -> None:
    body = {**CHAT_BODY, "n": 2, "temperature": 1.0, **({"stop": stop} if stop else {})}
    whole = client.post(CHAT, json=body).json()
    events = events_of(client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index in range(2):
        parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == whole["choices"][index]["message"]["content"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
        assert parts[0]["delta"]["role"] == "assistant"
    assert len({event["id"] for event in events}) == 1


def test_an_answer_that_may_hold_calls_is_streamed_as_one_piece(client: TestClient) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "f"}}
    body = {**CHAT_BODY, "tools": tools, "tool_choice": choice, "max_tokens": 60}
    whole = client.post(CHAT, json=body).json()
    events = events_of(client.post(CHAT, json={**body, "stream": True}).text)
    parts = [part for event in events for part in event["choices"]]
    assert len(parts) == 1
    message, delta = whole["choices"][0]["message"], parts[0]["delta"]
    calls = [{name: value for name, value in call.items() if name != "index"} for call in delta.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [call["function"] for call in message.get("tool_calls") or []]
    assert delta.get("content", "") == (message.get("content") or "")


def test_completions_are_streamed_too(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": ["the name", "of the"], "max_tokens": 8, "seed": 3}
    whole = client.post("/v1/completions", json=body).json()
    events = events_of(client.post("/v1/completions", json={**body, "stream": True}).text)
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]


RESPONSE_BODY = {"model": "tiny", "input": "the other one", "max_output_tokens": 12, "seed": 7}
TOOL = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
}


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a response, whose names and numbers are checked."""
    pairs = [event.split("\n") for event in text.split("\n\n") if event]
    found = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


@pytest.mark.parametrize("change", [{}, {"temperature": 1.0}, {"tools": [TOOL], "tool_choice": "required"}])
def test_a_streamed_response_is_the_response(client: TestClient, change: dict[str, Any]) -> None:
    body = {**RESPONSE_BODY, "max_output_tokens": 60, **change}
    whole = client.post("/v1/responses", json=body).json()
    events = named_events(client.post("/v1/responses", json={**body, "stream": True}).text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert last["response"]["id"] == events[0]["response"]["id"]
    assert last["response"]["created_at"] == events[0]["response"]["created_at"]
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == last["response"]["output"]
    for item, wanted in zip(items, whole["output"], strict=True):
        assert item.get("content") == wanted.get("content")
        own = [event for event in events if event.get("item_id") == item["id"]]
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_pieces_of_a_response_come_before_its_end(client: TestClient) -> None:
    events = named_events(client.post("/v1/responses", json={**RESPONSE_BODY, "stream": True}).text)
    assert sum(event["type"] == "response.output_text.delta" for event in events) > 1


def test_embeddings_are_those_of_a_line(client: TestClient) -> None:
    body = {"model": "tiny", "input": ["the name", "of the"]}
    row = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": body}
    done = wait_for(client, create(client, upload(client, json.dumps(row).encode()), endpoint="/v1/embeddings")["id"])
    (wanted,) = rows_of(client, done["output_file_id"])
    found = client.post("/v1/embeddings", json=body).json()
    assert found["data"] == wanted["response"]["body"]["data"]
    assert error_of(client.post("/v1/embeddings", json={**body, "stream": True}), 400)["param"] == "stream"


def test_single_requests_go_ahead_of_a_batch(client: TestClient) -> None:
    batch = create(client, upload(client, tiny_lines(300, "ahead")))
    wait_until(lambda: bool(client.get(f"/v1/batches/{batch['id']}/output").content))
    assert client.post(CHAT, json=CHAT_BODY).status_code == 200
    assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
    assert wait_for(client, batch["id"])["request_counts"]["completed"] == 300


@pytest.mark.parametrize(
    ("change", "status_code", "code"),
    [
        ({"model": "none"}, 404, "model_not_found"),
        ({"messages": []}, 400, None),
        ({"max_tokens": -1}, 400, None),
        ({"stream": "yes"}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "context_length_exceeded"),
        ({"messages": [], "stream": True}, 400, None),
    ],
)
def test_single_requests_that_cannot_be_answered(
    client: TestClient, change: dict[str, Any], status_code: int, code: str | None
) -> None:
    error = error_of(client.post(CHAT, json={**CHAT_BODY, **change}), status_code)
    assert code in (None, error["code"])
    assert not error["message"].startswith("line")
