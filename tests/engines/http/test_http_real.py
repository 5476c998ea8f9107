"""`blendserve run --engine http` against vLLM's own server, with a tiny random model; scripts/test-vllm runs this."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from batch_fakes import read_rows
from http_cases import KEY, assert_nowhere, errors_of
from vllm_cases import line
from vllm_real_cases import TIMEOUT_S, environment, finish, model, pytestmark, wait_for_answers

__all__ = ["model", "pytestmark"]

NAME = "tiny"


@pytest.fixture(scope="module")
def base_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that takes KEY, and ends with the tests of this file."""
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = ("--model", str(model), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port))
    limits = ("--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager")
    calls = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    settings = {
        "VLLM_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as file:
        # Not `vllm serve`, which looks for a distribution of that name: the CPU build has another.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *names, *limits, *calls]
        # A group of its own: its engine is another process, which must not outlive it.
        server = subprocess.Popen(
            command, env=environment() | settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for_health(server, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end_group(server)


def wait_for_health(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def end_group(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def start(base_url: str, lines: list[str], tmp_path: Path, *options: str, key: str = KEY) -> subprocess.Popen[str]:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    names = ("run", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", "http", "--base-url", base_url)
    command = [sys.executable, "-m", "blendserve", *names, "--json", *options]
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(
            command, env=environment() | {"BLENDSERVE_API_KEY": key}, stdout=subprocess.PIPE, stderr=log, text=True
        )


def chat(custom_id: str, text: str, **body: Any) -> str:
    return line(custom_id, **{"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 6, **body})


def completion(custom_id: str, prompt: object, **body: Any) -> str:
    return line(custom_id, "/v1/completions", **{"model": NAME, "prompt": prompt, "max_tokens": 6, **body})


def rows_by_id(rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    assert max(Counter(row["custom_id"] for row in rows).values()) == 1
    return {row["custom_id"]: row for row in rows}


def test_every_line_ends_once_answered_or_refused_by_the_server(base_url: str, tmp_path: Path) -> None:
    shared = "the capital of france is paris and the answer to the question is in the text that the user gave before. "
    lines = [
        *(chat(f"chat-{n}", f"{shared}{n}", ignore_eos=True) for n in range(4)),
        chat("choices", "tell", n=2, temperature=1.0, seed=3),
        chat("logprobs", "tell", logprobs=True, top_logprobs=2),
        completion("text", "the capital of"),
        completion("texts", ["the capital of", "the answer to"]),
        completion("tokens", [5, 6, 7], min_tokens=2),
        chat("refused", "tell", temperature=-1),
        chat("too-long", "tell " * 2000),
        chat("elsewhere", "tell", model="another"),
        "{no JSON",
    ]
    report = finish(start(base_url, lines, tmp_path), exit_code=3)
    answered, refused = rows_by_id(read_rows(tmp_path / "out.jsonl")), rows_by_id(errors_of(tmp_path / "out.jsonl"))
    assert set(answered) == {*(f"chat-{n}" for n in range(4)), "choices", "logprobs", "text", "texts", "tokens"}
    assert set(refused) == {"refused", "too-long", "elsewhere", None}
    assert (report["num_lines"], report["num_succeeded"]) == (len(lines), len(answered))
    bodies = {name: row["response"]["body"] for name, row in answered.items()}
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in answered.values())
    assert {name: len(body["choices"]) for name, body in bodies.items() if len(body["choices"]) > 1} == {
        "choices": 2,
        "texts": 2,
    }
    assert all(bodies[f"chat-{n}"]["usage"]["completion_tokens"] == 6 for n in range(4))
    assert bodies["logprobs"]["choices"][0]["logprobs"]["content"]
    for name in ("num_prompt_tokens", "num_output_tokens"):
        counted = {"num_prompt_tokens": "prompt_tokens", "num_output_tokens": "completion_tokens"}[name]
        assert report[name] == sum(body["usage"][counted] for body in bodies.values())
    statuses = {name: row["response"]["status_code"] for name, row in refused.items() if name is not None}
    assert statuses == {"refused": 400, "too-long": 400, "elsewhere": 404}
    assert all(refused[name]["response"]["body"]["error"]["message"] for name in statuses)
    assert refused[None]["error"]["code"] == "invalid_json_line"
    assert_nowhere(KEY, tmp_path)


def test_shapes_calls_responses_and_scores_are_passed_on(base_url: str, tmp_path: Path) -> None:
    flag = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "report", "parameters": flag}}
    named = {"type": "function", "function": {"name": "report"}}
    shape = {"type": "json_schema", "json_schema": {"name": "flag", "schema": flag, "strict": True}}
    text = "the capital of france"
    lines = [
        chat("shape", "tell", response_format=shape, max_tokens=80, temperature=0),
        chat("call", "tell", tools=[tool], tool_choice=named, max_tokens=300, temperature=0),
        line("response", "/v1/responses", model=NAME, input="tell", max_output_tokens=6),
        completion("scored", text, prompt_logprobs=0, max_tokens=1),
        line("tokens", "/tokenize", model=NAME, prompt=text),
    ]
    finish(start(base_url, lines, tmp_path))
    bodies = {row["custom_id"]: row["response"]["body"] for row in read_rows(tmp_path / "out.jsonl")}
    message = bodies["shape"]["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), flag)
    (call,) = bodies["call"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "report"  # this server does not hold arguments to their schema
    assert bodies["response"]["object"] == "response"
    assert bodies["response"]["output"]
    assert len(bodies["scored"]["choices"][0]["prompt_logprobs"]) == bodies["tokens"]["count"]


def test_killed_it_goes_on_where_it_was(base_url: str, tmp_path: Path) -> None:
    lines = [chat(f"id-{n}", f"tell {n}", max_tokens=4 if n < 4 else 200, ignore_eos=True) for n in range(24)]
    process = start(base_url, lines, tmp_path, "--max-inflight", "2")
    wait_for_answers(process, tmp_path, 2000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    report = finish(start(base_url, lines, tmp_path))
    assert 0 < int(str(report["num_resumed"])) < len(lines)
    assert report["num_succeeded"] == len(lines)
    assert set(rows_by_id(read_rows(tmp_path / "out.jsonl"))) == {f"id-{n}" for n in range(24)}
    assert not errors_of(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("path", "key", "words"), [("/nowhere", KEY, "check --base-url"), ("", "sk-wrong-key-0123456789", "HTTP 401")]
)
def test_a_wrong_path_or_key_ends_the_run_and_no_line(
    base_url: str, path: str, key: str, words: str, tmp_path: Path
) -> None:
    lines = [chat(f"id-{n}", "tell") for n in range(12)]
    process = start(base_url.replace("/v1", f"{path}/v1"), lines, tmp_path, key=key)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert words in (tmp_path / "log").read_text()
    report = finish(start(base_url, lines, tmp_path, "--fresh"))
    assert report["num_succeeded"] == len(lines)


def test_a_model_that_the_server_lacks_is_no_wrong_address(base_url: str, tmp_path: Path) -> None:
    lines = [chat(f"id-{n}", "tell", model="another") for n in range(12)]
    report = finish(start(base_url, lines, tmp_path), exit_code=3)
    assert report["num_succeeded"] == 0
    rows = rows_by_id(errors_of(tmp_path / "out.jsonl"))
    assert len(rows) == 12
    assert {row["response"]["status_code"] for row in rows.values()} == {404}
    assert all("does not exist" in json.dumps(row) for row in rows.values())
