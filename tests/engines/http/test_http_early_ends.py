"""Jobs through the HTTP engine that end early, by the server, its address or the user: what is finished is kept."""

from __future__ import annotations

import logging
import queue
import time
from pathlib import Path
from typing import Any

import pytest
from http_cases import (
    KEY,
    assert_all_answered,
    assert_each_line_once,
    assert_nowhere,
    chat_line,
    engine_for,
    errors_of,
    run_http,
    write_input,
)

from blendserve.engines.http import fake_server
from blendserve.engines.http.dispatch import MAX_DOUBTS
from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.errors import ExecutorError
from blendserve.job.interrupts import JobInterrupted

NUM_LINES = 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", NUM_LINES)


def test_a_server_that_goes_down_ends_the_run_and_a_later_one_resumes(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    told: list[str] = []
    with serving(FakeSettings(latency_s=0.002)) as server:
        engine = engine_for(server, notify=told.append)

        def cut(progress: Any) -> None:
            if progress.num_done == 10:
                server.settings = FakeSettings(faults={"closed": 1.0}, max_faults=10**6)

        with pytest.raises(ExecutorError, match=r"no answer for .* the limit is 600 s .* run the same"):
            run_http(engine, source, output, on_progress=cut)
        assert told
        assert "does not answer" in told[0]
        assert not output.exists()
        server.settings = FakeSettings()
        report = run_http(engine_for(server), source, output)
    assert report.num_resumed >= 10
    assert_all_answered(output, NUM_LINES)


def test_a_server_that_comes_back_costs_nothing_but_time(tmp_path: Path, source: Path) -> None:
    told: list[str] = []
    with serving() as first:
        port = first.port
    settings = FakeSettings()

    def start_server(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            server.__enter__()

    server = serving(settings, port)
    engine = engine_for(f"http://127.0.0.1:{port}", notify=start_server, retry={"max_attempts": 1})
    try:
        run_http(engine, source, tmp_path / "out.jsonl")
    finally:
        server.__exit__(None, None, None)
    assert [("does not answer" in text) for text in told] == [True, False]
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)


@pytest.mark.parametrize("status", [401, 402, 307])
def test_what_no_request_survives_ends_the_run(tmp_path: Path, status: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(chat_line("id-0", messages=[]))
    with serving(FakeSettings(refused_status=status)) as server:
        with pytest.raises(ExecutorError, match=f"HTTP {status}"):
            run_http(engine_for(server), source, tmp_path / "out.jsonl")
        assert len(server.exchanges) == 1
        server.settings = FakeSettings(refused_status=400)
        run_http(engine_for(server), source, tmp_path / "out.jsonl")
    assert_each_line_once(tmp_path / "out.jsonl", 1)


@pytest.mark.parametrize(("num_lines", "num_refused"), [(2, 2), (NUM_LINES, MAX_DOUBTS)])
def test_a_wrong_address_ends_the_run_before_any_line_is_an_error(
    tmp_path: Path, num_lines: int, num_refused: int
) -> None:
    source, output = write_input(tmp_path / "in.jsonl", num_lines), tmp_path / "out.jsonl"
    with serving() as server:
        message = rf"HTTP 404 \(no endpoint .*\) to all of the first {num_refused} .*check --base-url"
        with pytest.raises(ExecutorError, match=message):
            run_http(engine_for(f"{server.base_url}/nowhere"), source, output)
        assert not output.exists()
        assert not errors_of(output)
        run_http(engine_for(server), source, output, is_fresh=True)
    assert_all_answered(output, num_lines)


@pytest.mark.parametrize("max_inflight", [1, 8])
def test_a_line_that_is_refused_as_by_a_wrong_address_is_a_row_where_others_are_answered(
    tmp_path: Path, max_inflight: int
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = {0, 1, 2}
    source.write_text("\n".join(chat_line(f"id-{n}", **({"messages": []} if n in bad else {})) for n in range(12)))
    with serving(FakeSettings(refused_status=404)) as server:
        run_http(engine_for(server, settings={"max_inflight": max_inflight}), source, output, policy="fcfs")
    assert_each_line_once(output, 12)
    assert {row["custom_id"] for row in errors_of(output)} == {f"id-{n}" for n in bad}


def test_where_the_address_was_right_once_refusals_are_rows(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(chat_line(f"id-{n}", **({"messages": []} if n else {})) for n in range(20)))
    one = {"settings": {"max_inflight": 1}}
    with serving(FakeSettings(refused_status=404)) as server:
        with pytest.raises(JobInterrupted):
            run_http(engine_for(server, **one), source, output, policy="fcfs", on_progress=_interrupt_at(1))
        report = run_http(engine_for(server), source, output)
    assert report.num_resumed >= 1
    assert_each_line_once(output, 20)


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"

    def interrupt(progress: Any) -> None:
        if progress.num_done == 7:
            raise KeyboardInterrupt

    with serving(FakeSettings(latency_s=0.002)) as server:
        with pytest.raises(JobInterrupted, match=r"\d+ of 40"):
            run_http(engine_for(server), source, output, on_progress=interrupt)
        report = run_http(engine_for(server), source, output)
    assert 7 <= report.num_resumed < NUM_LINES
    assert_all_answered(output, NUM_LINES)


def test_answers_that_have_come_when_ctrl_c_strikes_while_a_row_is_written_are_kept(
    tmp_path: Path, source: Path
) -> None:
    def interrupt(progress: Any) -> None:
        if progress.num_done == 3:
            while engine.stats.num_answered < 7:
                time.sleep(0.001)
            raise KeyboardInterrupt

    with serving() as server:
        engine = engine_for(server)
        with pytest.raises(JobInterrupted, match=r"([789]|\d\d) of 40"):
            run_http(engine, source, tmp_path / "out.jsonl", on_progress=interrupt)
        report = run_http(engine_for(server), source, tmp_path / "out.jsonl")
        assert max(server.num_answers_by_key.values()) <= 2
    assert report.num_resumed >= 7
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)


def test_the_key_is_in_no_file_log_or_message(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the server repeats it: in error bodies, and in answers."""
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    error, choice = fake_server._error, fake_server._choice
    monkeypatch.setattr(fake_server, "_error", lambda message, status: error(f"{message}: {KEY}", status))
    monkeypatch.setattr(fake_server, "_choice", lambda *values: {**choice(*values), "heard": f"Bearer {KEY}"})
    with serving(FakeSettings(faults={"error": 0.5, "reset": 0.2}, max_faults=1000)) as server:
        engine = engine_for(server, notify=told.append, retry={"max_attempts": 2})
        with pytest.raises(JobInterrupted):
            run_http(engine, source, tmp_path / "out.jsonl", on_progress=_interrupt_at(20))
        assert_nowhere(KEY, tmp_path)
        run_http(engine, source, tmp_path / "out.jsonl")
    assert all(exchange.headers["authorization"] == f"Bearer {KEY}" for exchange in server.exchanges)
    assert_nowhere(KEY, tmp_path)
    assert "Bearer [api key]" in (tmp_path / "out.jsonl").read_text()
    assert "injected: error: [api key]" in (tmp_path / "out.errors.jsonl").read_text()
    assert KEY not in f"{told} {engine} {engine.credentials!r} {engine.stats}"
    assert KEY not in caplog.text


def _interrupt_at(num_done: int) -> Any:
    def interrupt(progress: Any) -> None:
        if progress.num_done == num_done:
            raise KeyboardInterrupt

    return interrupt


def test_answers_that_have_come_when_ctrl_c_strikes_are_kept(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedQueue(queue.SimpleQueue):  # type: ignore[type-arg]
        num_calls = 0

        def get(self, *_: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == 3:
                while self.qsize() < 4:
                    time.sleep(0.001)
                raise KeyboardInterrupt
            return super().get()

    with serving() as server:
        monkeypatch.setattr(queue, "SimpleQueue", InterruptedQueue)
        with pytest.raises(JobInterrupted):
            run_http(engine_for(server), source, tmp_path / "out.jsonl")
        monkeypatch.undo()
        report = run_http(engine_for(server), source, tmp_path / "out.jsonl")
    assert report.num_resumed >= 6
    assert_all_answered(tmp_path / "out.jsonl", NUM_LINES)
