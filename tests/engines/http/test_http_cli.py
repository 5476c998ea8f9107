"""`blendserve run --engine http` as users meet it: whole processes, killed and interrupted, and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_fakes import read_rows
from http_cases import KEY, assert_all_answered, assert_nowhere, write_input
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.engines.http import fake_server
from blendserve.engines.http.fake_server import FakeServer, FakeSettings, serving

NUM_LINES = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", NUM_LINES)


def arguments(server: FakeServer, source: Path, output: Path, *extra: str) -> list[str]:
    return ["run", str(source), "-o", str(output), "--engine", "http", "--base-url", server.base_url, *extra]


def start(args: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    command = [sys.executable, "-m", "blendserve", *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(process: subprocess.Popen[str], output: Path, num_bytes: int) -> None:
    records = output.with_name(output.name + ".journal") / "records"
    while process.poll() is None and not (records.exists() and records.stat().st_size > num_bytes):
        time.sleep(0.005)


def test_killed_at_any_moment_each_line_ends_once(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    faults = {"reset": 0.05, "malformed": 0.05, "error": 0.05}
    with serving(FakeSettings(latency_s=0.05, faults=faults)) as server:
        for num_bytes in (0, 2_000, 6_000, 12_000):
            process = start(arguments(server, source, output, "--max-inflight", "4", "--quiet"))
            wait_for_records(process, output, num_bytes)
            process.kill()
            printed = "".join(process.communicate())
            assert process.returncode == -signal.SIGKILL
            assert KEY not in printed
            assert_nowhere(KEY, tmp_path)
        before = len(server.exchanges)
        assert main(arguments(server, source, output, "--quiet")) == 0
        num_asked_again = sum(server.num_answers_by_key.values()) - NUM_LINES
    assert before < len(server.exchanges)
    assert_all_answered(output, NUM_LINES)
    assert 0 <= num_asked_again <= 4 * 4 + 4, "only what was on its way when a process died"


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    with serving(FakeSettings(latency_s=0.05)) as server:
        args = arguments(server, source, output, "--max-inflight", "4", "--policy", "blend")
        process = start(args)
        wait_for_records(process, output, 3_000)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=30)
        assert process.returncode == 130, error
        assert "run the same command again" in error
        assert "Traceback" not in error
        assert KEY not in printed + error
        process = start(args)
        printed, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert f"{NUM_LINES} answers" in printed
    assert "from an earlier run" in printed
    assert KEY not in printed + error
    assert_nowhere(KEY, tmp_path)
    assert_all_answered(output, NUM_LINES)


def test_the_summary_tells_what_was_sent(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        args = arguments(server, source, tmp_path / "out.jsonl", "--ordered", "--model", "big", "--json")
        assert main(args) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_succeeded"] == NUM_LINES
    assert any(f"{NUM_LINES} requests sent to {server.base_url}" in note for note in summary["notes"])
    assert any("The file asks for m; it was answered by big." in note for note in summary["notes"])
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == [f"id-{number}" for number in range(NUM_LINES)]
    assert {row["response"]["body"]["model"] for row in rows} == {"big"}


def test_a_tokenizer_counts_what_planning_needs(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_directory(tmp_path / "tiny")
    with serving() as server:
        for number, option in enumerate(("--tokenizer", "--model")):
            args = arguments(server, source, tmp_path / f"{number}.jsonl", option, str(tiny), "--quiet")
            assert main(args) == 0
            assert "planned by the tokenizer" in capsys.readouterr().out
    assert_all_answered(tmp_path / "1.jsonl", NUM_LINES)


def test_a_directory_that_has_the_models_name_by_chance_is_no_obstacle(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    with serving() as server:
        assert main(arguments(server, source, tmp_path / "out.jsonl", "--model", "big", "--quiet")) == 0
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)


def test_another_server_does_not_finish_the_job_of_the_first(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as first, serving() as second:
        assert main(arguments(first, source, tmp_path / "out.jsonl", "--quiet")) == 0
        assert main(arguments(second, source, tmp_path / "out.jsonl", "--quiet")) == 1
    error = capsys.readouterr().err
    assert f"base_url was {first.base_url}, is {second.base_url}" in error


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--engine", "http"], "--base-url"),
        (["--base-url", "http://localhost:1"], "add --engine http"),
        (["--engine", "http", "--base-url", "localhost:1"], "must look like"),
        (["--engine", "http", "--base-url", "http://192.168.1.300:8000"], "'http://192.168.1.300:8000'"),
        (["--engine", "http", "--base-url", "http://me:pw@localhost:1"], "BLENDSERVE_API_KEY"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, source: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(source), "-o", str(tmp_path / "out.jsonl"), *extra]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], "before anything is written"


@pytest.mark.parametrize("option", ["--max-inflight=0", "--request-timeout=0", "--max-attempts=x", "--max-outage=inf"])
def test_limits_must_make_sense(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "in.jsonl", "-o", "out.jsonl", option])
    assert option.split("=")[1] in capsys.readouterr().err


def test_any_endpoint_of_the_server_is_asked_however_its_address_is_spelled(tmp_path: Path) -> None:
    lines = [
        ("/v1/embeddings", {"input": ["one", "two"]}),
        ("/embeddings/", {"input": "one"}),
        ("https://elsewhere.example/v1/responses", {"input": "hello", "max_output_tokens": 4}),
        ("/openai/deployments/d/chat/completions?api-version=1", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/moderations", {"input": "hello"}),
        ("/rerank", {"query": "q", "documents": ["a", "b"]}),
        ("/score", {"text_1": "a", "text_2": ["b"]}),
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(
            json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})
            for number, (url, body) in enumerate(lines)
        )
    )
    with serving(FakeSettings()) as server:
        assert main(arguments(server, source, output, "--quiet", "--ordered")) == 0
    fields = [
        next(iter(row["response"]["body"].keys() & {"data", "output", "choices", "results"}))
        for row in read_rows(output)
    ]
    assert fields == ["data", "data", "output", "choices", "results", "results", "data"]


def test_headers_and_query_go_with_every_request_and_secrets_appear_nowhere(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef-secret"
    error, choice = fake_server._error, fake_server._choice
    monkeypatch.setattr(fake_server, "_error", lambda message, status: error(f"{message}: {secret}", status))
    monkeypatch.setattr(fake_server, "_choice", lambda *values: {**choice(*values), "heard": f"your key is {secret}"})
    headers = ["--header", f"api-key: {secret}", "--header", "X-Title=My application"]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(FakeSettings(faults={"error": 0.4}, max_faults=1000)) as server:
        url = f"{server.base_url}/?api-version=2024-10-21"
        args = ["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", "http", "--base-url", url, *headers]
        assert main([*args, "--max-attempts", "2"]) in (0, 3)
    for exchange in server.exchanges:
        assert exchange.path == "/v1/chat/completions?api-version=2024-10-21"
        assert (exchange.headers["api-key"], exchange.headers["x-title"]) == (secret, "My application")
        assert "authorization" not in exchange.headers
    printed = capsys.readouterr()
    assert secret not in printed.out + printed.err
    assert_nowhere(secret, tmp_path)
    assert "your key is [api key]" in (tmp_path / "out.jsonl").read_text()
    assert "injected: error: [api key]" in (tmp_path / "out.errors.jsonl").read_text()


@pytest.mark.parametrize("header", ["0123456789abcdef-secret", "=0123456789abcdef-secret", "key: 0123456789abcdef-é"])
def test_a_header_that_is_none_is_refused_without_its_value(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], header: str
) -> None:
    args = [
        "run",
        str(source),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--engine",
        "http",
        "--base-url",
        "http://localhost:1",
    ]
    assert main([*args, "--header", header]) == 1
    printed = "".join(capsys.readouterr())
    assert "--header" in printed
    assert "0123456789abcdef" not in printed
