"""`blendserve serve --engine vllm` on the installed vLLM: single requests beside batches. scripts/test-vllm runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
import httpx2
from serve_cases import CHAT, wait_until
from serve_process import free_port
from vllm_cases import chat
from vllm_real_cases import TIMEOUT_S, environment, model, pytestmark

__all__ = ["model", "pytestmark"]

BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the other one"}],
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module", params=["front", "blend", "own process"])
def client(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    ways = {"front": (), "blend": ("--vllm-scheduler", "blend"), "own process": ("--own-process",)}
    data, port = tmp_path_factory.mktemp("served") / "data", free_port()
    limits = ("--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "256", "--kv-memory", "4MiB")
    command = [
        *(sys.executable, "-m", "blendserve", "serve", "--data", str(data), "--port", str(port), "--engine", "vllm"),
        *("--model", f"tiny={model}", *limits, "--threads", "1", "--vllm-arg", "dtype=float32"),
        *ways[request.param],
    ]
    log = data.parent / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**environment(), "OMP_NUM_THREADS": "1"})
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as found:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                with suppress(httpx2.TransportError):
                    return bool(found.get("/health/ready").status_code == 200)
                return False

            wait_until(is_ready, TIMEOUT_S)
            yield found
    finally:
        process.terminate()
        process.wait(60)
        print(log.read_text()[-3000:], file=sys.stderr)


def deltas_of(client: httpx2.Client, body: dict[str, Any]) -> list[str]:
    text = client.post(CHAT, json={**body, "stream": True}).text
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]", text
    return [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]


def text_of(client: httpx2.Client, body: dict[str, Any]) -> str:
    reply = client.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_single_requests_are_answered_and_streamed(client: httpx2.Client) -> None:
    whole = text_of(client, BODY)
    pieces = deltas_of(client, BODY)
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    assert text_of(client, {**BODY, "stop": [whole[5:8]]}) == whole[:5]
    found = client.post("/v1/responses", json={"model": "tiny", "input": "the other one", "max_output_tokens": 5})
    assert found.json()["status"] == "incomplete", found.text
    reply = client.post(CHAT, json={**BODY, "messages": [{"role": "user", "content": "word " * 5000}]})
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_single_requests_go_ahead_of_a_batch(client: httpx2.Client) -> None:
    alone = text_of(client, BODY)
    lines = [chat(f"id-{n}", f"tell {n}", model="tiny", max_tokens=200, ignore_eos=True) for n in range(40)]
    file = client.post("/v1/files", files={"file": ("in.jsonl", "\n".join(lines))}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked).json()
    wait_until(lambda: bool(client.get(f"/v1/batches/{batch['id']}/output").content), TIMEOUT_S)
    assert "".join(deltas_of(client, BODY)) == alone

    def state() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/batches/{batch['id']}").json()
        return found

    assert state()["status"] == "in_progress"
    wait_until(lambda: state()["status"] == "completed", TIMEOUT_S)
    assert state()["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
