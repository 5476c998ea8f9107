"""Rows for want of memory: a run with another memory setting tries those lines again, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batch_fakes import (
    NUM_JOB_REQUESTS,
    FakeEngine,
    answer,
    batch_line,
    comparable,
    errors_of,
    mixed_lines,
    read_rows,
    run_fake,
    write_lines,
)

from blendserve.errors import CapacityError
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.pending import PendingRequests
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.request import SequenceOutput

SMALL, LARGE = 20, 1000
"""Memory in tokens: some prompts of `mixed_lines` are longer than the small one."""


class SmallEngine:
    """Answers what fits the memory; the rest are errors for want of it. `stops_after` answers it is interrupted."""

    def __init__(self, capacity: int, stops_after: int | None = None) -> None:
        self.tried: list[int] = []
        self._capacity = capacity
        self._stops_after = stops_after

    def __call__(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        for row in range(len(pending)):
            if len(self.tried) == self._stops_after:
                raise KeyboardInterrupt
            request = pending[row]
            self.tried.append(int(pending.numbers[row]))
            if request.num_prompt_tokens <= self._capacity:
                yield answer(request)
            else:
                error = CapacityError(f"{request.num_prompt_tokens} tokens do not fit {self._capacity}")
                yield SequenceOutput(row, np.zeros(0, np.int32), "error", request.num_prompt_tokens, 0, error=error)


def run(source: Path, output: Path, capacity: int, stops_after: int | None = None) -> SmallEngine:
    engine = SmallEngine(capacity, stops_after)
    run_fake(source, output, engine, capacity=capacity, is_ordered=True)
    return engine


def codes(output: Path) -> list[str]:
    return [row["error"]["code"] for row in read_rows(errors_of(output)) if row["error"]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    long = [batch_line(f"long-{number}", {"prompt": ["short", "a prompt longer than the rest"]}) for number in range(3)]
    return write_lines(tmp_path / "in.jsonl", [*long, *mixed_lines(60)])


def test_a_larger_memory_answers_what_was_refused_and_nothing_else(tmp_path: Path, source: Path) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(source, whole, LARGE)
    first = run(source, output, SMALL)
    refused = codes(output).count("insufficient_memory")
    assert 3 <= refused < 60
    again = run(source, output, SMALL)
    assert again.tried == [], "nothing has changed: the job is complete"
    larger = run(source, output, LARGE)
    assert 0 < len(larger.tried) < len(first.tried) / 2
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
    assert sorted(path.name for path in (tmp_path / "out.jsonl.journal").iterdir()) == [
        "complete.json",
        "lines",
        "lock",
    ]
    assert run(source, output, SMALL).tried == [], "what is answered stays answered"


def test_the_note_says_how_many_and_what_to_do(tmp_path: Path, source: Path) -> None:
    report = run_fake(source, tmp_path / "out.jsonl", SmallEngine(SMALL), capacity=SMALL)
    (note,) = [note for note in report.notes if "--kv-memory" in note]
    assert note.startswith(f"{report.errors_by_code['insufficient_memory']} of the lines")
    again = run_fake(source, tmp_path / "out.jsonl", SmallEngine(SMALL), capacity=SMALL)
    assert again.was_complete
    assert note in again.notes


@pytest.mark.parametrize("stops_after", [0, 1, 40, 90])
def test_an_interrupted_job_goes_on_under_another_memory(tmp_path: Path, source: Path, stops_after: int) -> None:
    """Refusals of the first run do not count for the second; what the second refuses does for a third."""
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(source, whole, LARGE)
    with pytest.raises(JobInterrupted):
        run(source, output, SMALL, stops_after)
    with pytest.raises(JobInterrupted):
        run(source, output, SMALL + 1, 5)
    last = run(source, output, LARGE)
    assert len(last.tried) <= NUM_JOB_REQUESTS + 6
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))


def test_a_retry_that_is_interrupted_keeps_what_was_answered(tmp_path: Path, source: Path) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(source, whole, LARGE)
    run(source, output, SMALL)
    before = output.read_bytes()
    with pytest.raises(JobInterrupted):
        run(source, output, LARGE, 2)
    assert output.read_bytes() == before, "the files of the first run stand until better ones do"
    assert len(run(source, output, LARGE).tried) > 0
    assert comparable(output) == comparable(whole)


def test_a_lost_output_is_made_again(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(source, output, SMALL)
    content = comparable(output)
    output.unlink()
    run(source, output, SMALL)
    assert comparable(output) == content


def test_errors_of_other_kinds_are_final(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(source, output, FakeEngine(), capacity=SMALL)
    engine = FakeEngine()
    assert run_fake(source, output, engine, capacity=LARGE).was_complete
    assert engine.num_answers == 0


def test_dropping_a_kind_moves_the_others_up(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "records")
    kinds = [RecordKind.OUTPUT_ROW, RecordKind.CAPACITY_ROW, RecordKind.CHOICE, RecordKind.CAPACITY_ROW]
    for number, kind in enumerate(kinds):
        log.append(kind, number, number, b"x" * number)
    log.close()
    with (tmp_path / "records").open("ab") as file:
        file.write(b"torn")
    log = RecordLog(tmp_path / "records")
    assert log.drop({RecordKind.CAPACITY_ROW}) == 2
    assert log.drop({RecordKind.CAPACITY_ROW}) == 0
    found: list[tuple[RecordKind, int, bytes]] = []
    assert log.recover(lambda record: found.append((record.kind, record.line_number, record.body))) == 0
    assert found == [(RecordKind.OUTPUT_ROW, 0, b""), (RecordKind.CHOICE, 2, b"xx")]
    offset = log.append(RecordKind.OUTPUT_ROW, 9, 0, b"new")
    assert log.read(offset).body == b"new"
    log.close()
