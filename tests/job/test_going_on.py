"""What a job keeps when it is tried again: failures that may pass, inputs that changed, jobs that answered nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import (
    NUM_JOB_LINES,
    SERVED,
    FakeEngine,
    batch_line,
    comparable,
    errors_of,
    mixed_lines,
    read_rows,
    run_fake,
    stop_after,
    write_lines,
)
from crash_children import exit_code_of, in_child

from blendserve.dialect.schema import ServedModel
from blendserve.errors import CapacityError, ConfigError, ExecutorError, RequestError
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput, ServerResponse

CAUSES: dict[str, Exception | ServerResponse] = {
    "engine failure": ExecutorError("the engine died"),
    "no reason": RequestError("died", code="engine_failure", status_code=500),
    "timeout": RequestError("no complete response", code="request_timeout", status_code=0),
    "overloaded": ServerResponse(503, {"error": {"message": "busy"}}),
    "throttled": ServerResponse(429, {"error": {"message": "slow down", "code": "rate_limit"}}),
    "memory": CapacityError("too little memory"),
    "refused": ServerResponse(400, {"error": {"message": "wrong", "code": "bad"}}),
    "wrong": RequestError("wrong", code="invalid_value"),
}
STAYS = ("refused", "wrong")


def failing(pending: PendingRequests) -> Iterator[SequenceOutput]:
    """Answers every other line; the rest fails, each for a reason of its own."""
    for output in FakeEngine()(pending):
        custom_id = pending.store.line(int(pending.store.line_of_request[pending.numbers[output.index]])).custom_id
        cause = CAUSES.get(custom_id)
        if isinstance(cause, ServerResponse):
            yield SequenceOutput(output.index, np.zeros(0, np.int32), "stop", 0, 0, response=cause)
        elif cause is not None:
            yield SequenceOutput(output.index, np.zeros(0, np.int32), "error", 0, 0, error=cause)
        else:
            yield output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [batch_line("good"), *(batch_line(name) for name in CAUSES), "{broken"])


def ids(path: Path) -> list[Any]:
    return sorted((row["custom_id"] for row in read_rows(path)), key=str)


def test_what_may_pass_is_counted_and_tried_again_and_all_else_is_kept(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = run_fake(source, output, failing)
    assert ids(output) == ["good"]
    assert (first.exit_code, sum(first.retriable_by_code.values())) == (3, 6)
    assert any("5 lines failed for a reason that may pass" in note and "--retry-failed" in note for note in first.notes)
    engine = FakeEngine()
    plain = run_fake(source, output, engine)
    assert (plain.was_complete, plain.retriable_by_code, engine.num_answers) == (True, first.retriable_by_code, 0)
    again = run_fake(source, output, engine, retries_failed=True)
    assert engine.num_answers == 6
    assert ids(output) == sorted(["good", *(name for name in CAUSES if name not in STAYS)])
    assert ids(errors_of(output)) == [None, *STAYS]
    assert (again.num_resumed, again.retriable_by_code, again.exit_code) == (3, {}, 3)
    last = run_fake(source, output, engine, retries_failed=True)
    assert (last.was_complete, engine.num_answers) == (True, 6)


def test_what_fails_again_may_be_tried_once_more(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(source, output, failing)
    rows = comparable(output), comparable(errors_of(output))
    run_fake(source, output, failing, retries_failed=True)
    assert (comparable(output), comparable(errors_of(output))) == rows
    with pytest.raises(JobInterrupted):
        run_fake(source, output, stop_after(2, KeyboardInterrupt()), retries_failed=True)
    engine = FakeEngine()
    run_fake(source, output, engine)
    assert engine.num_answers == 4, "the two that were tried again before the interrupt are kept"


def test_an_interrupted_job_tries_failed_lines_again_too(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [batch_line("timeout"), *(batch_line(str(n)) for n in range(9))])
    output = tmp_path / "out.jsonl"

    def stopped(pending: PendingRequests) -> Iterator[SequenceOutput]:
        for count, end in enumerate(failing(pending)):
            if count == 4:
                raise KeyboardInterrupt
            yield end

    with pytest.raises(JobInterrupted):
        run_fake(source, output, stopped)
    engine = FakeEngine()
    report = run_fake(source, output, engine, retries_failed=True)
    assert (engine.num_answers, report.num_succeeded, report.exit_code) == (7, 10, 0)


def changed_lines() -> list[Any]:
    """The lines of `mixed_lines`: some gone, some mended, some new, and most of them in other places."""
    lines = mixed_lines(NUM_JOB_LINES)
    del lines[3]
    lines[5] = batch_line("mended")
    lines.insert(0, batch_line("new"))
    lines[20], lines[40] = lines[40], lines[20]
    lines.append(batch_line("id-0", {"prompt": "a line that changed under its id"}))
    lines.remove(mixed_lines(1)[0])
    return lines


@pytest.mark.parametrize("kind", ["finished", "interrupted", "finished with failures"])
def test_a_changed_input_keeps_the_answers_to_lines_that_did_not_change(
    tmp_path: Path, job_input: Path, kind: str
) -> None:
    output, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    if kind == "interrupted":
        with pytest.raises(JobInterrupted):
            run_fake(job_input, output, stop_after(60, KeyboardInterrupt()))
    elif kind == "finished":
        run_fake(job_input, output)
    else:
        write_lines(job_input, [*mixed_lines(NUM_JOB_LINES), batch_line("timeout")])
        run_fake(job_input, output, failing)
    write_lines(job_input, changed_lines())
    with pytest.raises(ConfigError, match=r"changed since: add --reuse.*--fresh"):
        run_fake(job_input, output)
    engine = FakeEngine()
    report = run_fake(job_input, output, engine, reuses=True)
    whole = FakeEngine()
    run_fake(job_input, expected, whole)
    assert comparable(output) == comparable(expected)
    assert comparable(errors_of(output)) == comparable(errors_of(expected))
    assert report.num_resumed + engine.num_answers == whole.num_answers
    assert engine.num_answers == 3 if kind != "interrupted" else 3 < engine.num_answers < whole.num_answers
    again = run_fake(job_input, output, engine)
    assert again.was_complete, "from now on it is a job like any other"


def test_reuse_is_no_way_around_other_differences(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output, settings={"dtype": "bf16"})
    write_lines(job_input, changed_lines())
    with pytest.raises(ConfigError, match="--dtype was bf16, is int8"):
        run_fake(job_input, output, settings={"dtype": "int8"}, reuses=True)
    with output.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ConfigError, match="not of this job"):
        run_fake(job_input, output, settings={"dtype": "bf16"}, reuses=True)


def test_inputs_may_change_again_and_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    total = 0
    for number in range(1, 6):
        write_lines(source, [batch_line(f"{n}") for n in range(number * 3)])
        engine = FakeEngine()
        if number % 2:
            with pytest.raises(JobInterrupted):
                run_fake(source, output, stop_after(1, KeyboardInterrupt()), reuses=True)
            total += 1
        run_fake(source, output, engine, reuses=True)
        total += engine.num_answers
    assert total == len(read_rows(output)) == 15
    left = sorted(path.name for path in (tmp_path / "out.jsonl.journal").iterdir())
    assert left == ["complete.json", "lines", "lock"]


def test_kill_9_while_a_changed_input_is_taken_over(tmp_path: Path, job_input: Path) -> None:
    """Killed at any moment of reading, carrying over and running, `--reuse` ends with the files of a fresh run."""
    output, expected, moments = tmp_path / "out.jsonl", tmp_path / "expected.jsonl", random.Random(5)

    def work() -> int:
        engine = FakeEngine(on_answer=lambda _: time.sleep(0.001))
        run_fake(job_input, output, engine, reuses=True, retries_failed=True, is_ordered=True)
        return 0

    num_kills = 0
    for round_ in range(12):
        lines = changed_lines() if round_ % 2 else mixed_lines(NUM_JOB_LINES)
        write_lines(job_input, [*lines, batch_line(f"round {round_}")])
        child = in_child(work)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        num_kills += exit_code_of(child) == -signal.SIGKILL
    assert num_kills > 3
    assert exit_code_of(in_child(work)) == 0
    run_fake(job_input, expected, is_ordered=True)
    assert comparable(output) == comparable(expected)
    assert comparable(errors_of(output)) == comparable(errors_of(expected))


def test_a_job_that_answered_nothing_is_no_obstacle(tmp_path: Path) -> None:
    """A model that refuses all lines, and then the right one."""
    lines = [batch_line("a", {"prompt": "x" * 3000}), batch_line("b", {"prompt": ""})]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    first = run_fake(source, output)
    assert (first.num_succeeded, first.exit_code) == (0, 3)
    larger = ServedModel(("large",), vocab_size=256, max_model_len=8192)
    write_lines(source, [batch_line("a", {"prompt": "x" * 3000, "model": "large"})])
    assert run_fake(source, output, served=larger).exit_code == 0
    with pytest.raises(ConfigError, match="belongs to another job"):
        run_fake(source, output, served=SERVED)


def test_a_begun_job_that_answered_nothing_is_no_obstacle(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(0, KeyboardInterrupt()), settings={"dtype": "bf16"})
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(3, KeyboardInterrupt()), settings={"dtype": "int8"})
    with pytest.raises(ConfigError, match="--dtype was int8, is bf16"):
        run_fake(job_input, output, settings={"dtype": "bf16"})
