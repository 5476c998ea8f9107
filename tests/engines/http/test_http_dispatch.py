"""Whole jobs through the HTTP engine against a server that misbehaves: nothing lost, nothing twice, nothing told."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import read_rows
from http_cases import (
    KEY,
    FakeClock,
    assert_all_answered,
    assert_each_line_once,
    chat_line,
    engine_for,
    errors_of,
    run_http,
    write_input,
)

from blendserve.dialect.schema import ServedModel
from blendserve.engines.http import fake_server
from blendserve.engines.http.fake_server import FAULTS, FakeSettings, answer, serving
from blendserve.errors import ExecutorError

NUM_LINES = 40
QUICK = {"timeout_s": 0.25, "max_response_bytes": 100_000}
"""Hanging and trickling responses are waited for in real time."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", NUM_LINES)


def test_answers_are_the_servers_own_bodies(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tools = [{"type": "function", "function": {"name": "f"}}]
    source.write_text(chat_line("a", n=2, tools=tools, response_format={"type": "json_object"}, made_up={"x": [1.5]}))
    with serving() as server:
        report = run_http(engine_for(server), source, output)
    (exchange,) = server.exchanges
    assert exchange.path == "/v1/chat/completions"
    assert json.loads(exchange.body) == json.loads(source.read_text())["body"]
    assert exchange.headers["authorization"] == f"Bearer {KEY}"
    (row,) = read_rows(output)
    _, expected = answer("/v1/chat/completions", exchange.body)
    assert row["response"]["body"] == json.loads(expected)
    assert row["response"]["status_code"] == 200
    assert row["error"] is None
    usage = row["response"]["body"]["usage"]
    assert (report.num_prompt_tokens, report.num_output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_named_model_takes_the_place_of_the_lines_own(tmp_path: Path, source: Path) -> None:
    with serving() as server:
        served = ServedModel(("big-model",), is_remote=True)
        run_http(engine_for(server), source, tmp_path / "out.jsonl", served=served)
    assert {json.loads(exchange.body)["model"] for exchange in server.exchanges} == {"big-model"}


@pytest.mark.parametrize("fault", FAULTS)
def test_under_each_fault_nothing_is_lost_and_nothing_twice(tmp_path: Path, fault: str) -> None:
    is_waited_for = fault in ("hang", "slow")
    num_lines, settings = (12, QUICK) if is_waited_for else (NUM_LINES, {**QUICK, "timeout_s": 60.0})
    source = write_input(tmp_path / "in.jsonl", num_lines)
    with serving(FakeSettings(faults={fault: 0.4}, seed=3)) as server:
        report = run_http(engine_for(server, settings=settings), source, tmp_path / "out.jsonl")
    assert any(exchange.fault == fault for exchange in server.exchanges)
    assert_all_answered(tmp_path / "out.jsonl", num_lines)
    assert report.num_succeeded == num_lines
    if not is_waited_for:  # a busy machine may answer too late for so short a timeout
        assert set(server.num_answers_by_key.values()) == {1}


@pytest.mark.parametrize("policy", ["blend", "fcfs", "paper"])
def test_under_all_faults_at_once(tmp_path: Path, source: Path, policy: str) -> None:
    faults = dict.fromkeys(FAULTS, 0.04)
    with serving(FakeSettings(faults=faults, seed=5)) as server:
        run_http(engine_for(server, settings=QUICK), source, tmp_path / "out.jsonl", policy=policy)
    assert len({exchange.fault for exchange in server.exchanges}) > 6
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)


def test_the_window_is_full_but_never_exceeded(tmp_path: Path, source: Path) -> None:
    with serving(FakeSettings(latency_s=0.02)) as server:
        engine = engine_for(server, settings={"max_inflight": 5})
        run_http(engine, source, tmp_path / "out.jsonl", policy="blend")
    assert server.max_open == 5
    assert engine.stats.max_inflight == 5


@pytest.mark.parametrize(("retry_after", "least_s"), [("7", 7.0), ("0.5", 0.5), ("soon", 0.0)])
def test_retry_after_is_honoured(tmp_path: Path, retry_after: str, least_s: float) -> None:
    source, clock = write_input(tmp_path / "in.jsonl", 1), FakeClock()
    with serving(FakeSettings(num_storm=3, retry_after=retry_after)) as server:
        run_http(engine_for(server, clock=clock), source, tmp_path / "out.jsonl")
    assert len(server.exchanges) == 4
    assert clock.now_s - 1000.0 >= 3 * least_s
    assert_all_answered(tmp_path / "out.jsonl", 1)


@pytest.mark.parametrize("policy", ["fcfs", "blend"])
@pytest.mark.parametrize("is_throttled_first", [True, False])
def test_a_model_over_its_daily_quota_holds_up_no_other_and_ends_the_run(
    tmp_path: Path, is_throttled_first: bool, policy: str
) -> None:
    source, output, clock, told = tmp_path / "in.jsonl", tmp_path / "out.jsonl", FakeClock(), list[str]()
    lines = [chat_line(f"id-{n}", model="a" if (n < 20) == is_throttled_first else "b") for n in range(40)]
    source.write_text("\n".join(lines))
    with serving(FakeSettings(throttled_model="a", retry_after="86400")) as server:
        engine = engine_for(server, clock=clock, notify=told.append, settings={"max_inflight": 4})
        with pytest.raises(
            ExecutorError, match=r"asks for no requests for 86400 s, the limit is 600 s .*: 20 requests are left"
        ):
            run_http(engine, source, output, policy=policy)
        assert sum(server.num_answers_by_key.values()) == 20, "all of the other model"
        assert len(server.exchanges) <= 24, "those on their way together"
        assert clock.now_s < 1000.0 + 600.0
        assert len(told) == 1
        assert "wants no requests for model 'a' for 86400 s" in told[0]
        assert not output.exists()
        server.settings = FakeSettings()
        report = run_http(engine_for(server), source, output)
        assert set(server.num_answers_by_key.values()) == {1}
    assert report.num_resumed == 20
    assert_all_answered(output, 40)


def test_a_model_that_answers_what_was_on_its_way_is_asked_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(chat_line(f"id-{n}", model="b" if n == 2 else "a") for n in range(10)))
    with serving(FakeSettings(num_storm=1, retry_after="86400", latency_s=0.1)) as server:
        engine = engine_for(server, settings={"max_inflight": 2})
        with pytest.raises(ExecutorError, match=": 1 requests are left"):
            run_http(engine, source, output, policy="fcfs")
        assert run_http(engine_for(server), source, output).num_resumed == 9
    assert_all_answered(output, 10)


def test_a_storm_of_429_costs_no_request_its_tries(tmp_path: Path, source: Path) -> None:
    with serving(FakeSettings(num_storm=200, retry_after="1")) as server:
        engine = engine_for(server, retry={"max_attempts": 2, "max_outage_s": 1e6})
        run_http(engine, source, tmp_path / "out.jsonl")
    assert engine.stats.num_throttled == 200
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)


def test_a_window_of_one_does_not_make_a_request_the_last(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 3)
    with serving(FakeSettings(num_storm=20, retry_after="1")) as server:
        limits = {"settings": {"max_inflight": 1}, "retry": {"max_attempts": 2, "max_outage_s": 1e6}}
        run_http(engine_for(server, **limits), source, tmp_path / "out.jsonl")
    assert_all_answered(tmp_path / "out.jsonl", 3)


def test_what_the_server_refuses_is_an_error_row_at_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([chat_line("id-0"), chat_line("id-1", messages=[])]))
    with serving(FakeSettings(refused_status=422)) as server:
        report = run_http(engine_for(server), source, output)
    assert len(server.exchanges) == 2
    (row,) = errors_of(output)
    assert row["response"]["status_code"] == 422
    assert row["response"]["body"]["error"]["message"] == "messages or prompt is missing"
    assert report.errors_by_code == {"fake_422": 1}
    assert_each_line_once(output, 2)


@pytest.mark.parametrize(
    ("fault", "code", "status"),
    [
        ("error", "fake_500", 500),
        ("malformed", "invalid_server_response", None),
        ("html", "invalid_server_response", None),
        ("huge", "invalid_server_response", None),
        ("truncated", "connection_error", None),
        ("hang", "request_timeout", None),
    ],
)
def test_a_request_that_never_succeeds_ends_as_a_row_after_its_tries(
    tmp_path: Path, fault: str, code: str, status: int | None
) -> None:
    source, output = write_input(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    with serving(FakeSettings(faults={fault: 1.0}, max_faults=1000)) as server:
        engine = engine_for(server, settings={**QUICK, "timeout_s": 0.1}, retry={"max_attempts": 3})
        report = run_http(engine, source, output)
    assert len(server.exchanges) == 6
    assert report.errors_by_code == {code: 2}
    for row in errors_of(output):
        if status:
            assert row["response"]["status_code"] == status
        else:
            assert "try 3 of 3" in row["error"]["message"]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ({"error": {"message": "the answer is not for you", "code": "not_for_you"}}, "not_for_you", "is not for you"),
        (
            {"id": "r-1", "choices": [], "usage": {"prompt_tokens": 4}},
            "no_answer",
            "there are no choices",
        ),
    ],
)
def test_a_200_without_an_answer_is_asked_for_once_and_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], code: str, words: str
) -> None:
    source, output = write_input(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    monkeypatch.setattr(fake_server, "answer", lambda *_: (200, json.dumps(content).encode()))
    with serving() as server:
        report = run_http(engine_for(server), source, output)
    assert len(server.exchanges) == 2
    assert report.errors_by_code == {code: 2}
    assert report.num_succeeded == 0
    for row in errors_of(output):
        assert row["response"]["body"] == content
        assert row["response"]["status_code"] == 200
        assert row["error"]["code"] == code
        assert words in row["error"]["message"]


def test_an_error_that_may_pass_is_kept_when_it_does_not(tmp_path: Path) -> None:
    source, output = write_input(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    with serving(FakeSettings(faults={"busy": 1.0}, max_faults=1000)) as server:
        run_http(engine_for(server, retry={"max_attempts": 3}), source, output)
    assert len(server.exchanges) == 3
    (row,) = errors_of(output)
    assert row["response"]["body"]["error"]["message"] == "injected: busy, try again"
    assert "try 3 of 3" in row["error"]["message"]


def test_a_finished_job_sends_nothing(tmp_path: Path, source: Path) -> None:
    with serving() as server:
        run_http(engine_for(server), source, tmp_path / "out.jsonl")
        before = len(server.exchanges)
        assert run_http(engine_for(server), source, tmp_path / "out.jsonl").was_complete
        assert len(server.exchanges) == before == NUM_LINES


def test_half_a_surrogate_pair_in_an_answer_stays_one(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = fake_server._choice
    monkeypatch.setattr(fake_server, "_choice", lambda *values: {**choice(*values), "text": "\ud83d and \u2028"})
    with serving() as server:
        run_http(engine_for(server), source, tmp_path / "out.jsonl")
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)
    assert {row["response"]["body"]["choices"][0]["text"] for row in read_rows(tmp_path / "out.jsonl")} == {
        "\ud83d and \u2028"
    }


def test_a_slow_disk_holds_back_what_is_sent(tmp_path: Path, source: Path) -> None:
    sent: list[int] = []

    def wait(progress: Any) -> None:
        if progress.num_done == 1:
            time.sleep(0.3)
            sent.append(len(server.exchanges))

    with serving() as server:
        run_http(engine_for(server, settings={"max_inflight": 3}), source, tmp_path / "out.jsonl", on_progress=wait)
    assert 3 <= sent[0] <= 10, "a window on its way, a window to be written, and the row at hand"
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)
