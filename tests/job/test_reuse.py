"""A job whose input changed keeps the answers of lines that did not: behind a door that reuses, and behind no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batch_fakes import SERVED, FakeCodec, FakeEngine, batch_line, read_rows, stop_after, write_lines

from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.door import BatchFile
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.journal import Journal
from blendserve.job.reuse import KEY_BYTES, KeptAnswers, KeyedLines
from blendserve.job.run import run_job


class ReusingFile(BatchFile):
    """A batch file whose unchanged lines keep their answers."""

    reuses = True


def run(source: Path, output: Path, engine: FakeEngine, **fields: Any) -> JobReport:
    job = BatchJob(source, output, SERVED, "tiny@1", is_ordered=True, **fields)
    return run_job(job, FakeCodec(), engine, door=ReusingFile(source, output, None, SERVED), clock=lambda: 1e9)


def chat(number: int, text: str) -> dict[str, Any]:
    return batch_line(f"r{number}", {"messages": [{"role": "user", "content": text}], "temperature": 0, "seed": 1})


def texts(output: Path) -> list[str]:
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in read_rows(output)]


def test_a_file_that_grew_costs_what_grew(tmp_path: Path) -> None:
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    lines = [chat(number, f"question {number}") for number in range(20)]
    write_lines(source, lines)
    run(source, output, FakeEngine())
    grown = [
        chat(100, "a new first one"),
        *lines[:7],
        chat(7, "a changed one"),
        *lines[8:],
        chat(101, "a new last one"),
    ]
    write_lines(source, grown)
    engine = FakeEngine()
    report = run(source, output, engine)
    assert engine.num_answers == 3
    assert (report.num_reused, report.num_succeeded) == (19, 22)
    run(source, whole, FakeEngine())
    assert texts(output) == texts(whole)
    again = FakeEngine()
    write_lines(source, [*grown, chat(102, "one more")])
    assert run(source, output, again).num_reused == 22
    assert again.num_answers == 1


def test_answers_of_an_interrupted_run_are_kept_too(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [chat(number, f"question {number}") for number in range(20)]
    write_lines(source, lines)
    with pytest.raises(ExecutorError):
        run(source, output, stop_after(8, ExecutorError("gone")))
    write_lines(source, lines[2:])
    engine = FakeEngine()
    assert run(source, output, engine).num_reused == 6
    assert engine.num_answers == 12


def test_every_answer_is_taken_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [chat(number, "the same") for number in range(3)])
    run(source, output, FakeEngine())
    write_lines(source, [chat(number, "the same") for number in range(5)])
    engine = FakeEngine()
    assert run(source, output, engine).num_reused == 3
    assert engine.num_answers == 2


@pytest.mark.parametrize("is_header_written", [False, True])
def test_a_crash_while_the_changed_input_is_read_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_header_written: bool
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [chat(number, f"question {number}") for number in range(20)]
    write_lines(source, lines)
    run(source, output, FakeEngine())
    write_lines(source, [chat(100, "a new one"), *lines])

    def crash(*_: Any) -> None:
        raise OSError("power cut")

    for target, name in (
        (KeyedLines, "flush"),
        (Journal, "discard_set_aside" if is_header_written else "write_header"),
    ):
        monkeypatch.setattr(target, name, crash)
        with pytest.raises(OSError, match="power cut"):
            run(source, output, FakeEngine())
        monkeypatch.undo()
    engine = FakeEngine()
    run(source, output, engine)
    assert engine.num_answers == 1
    assert not (tmp_path / "out.jsonl.journal" / "kept").exists()


def test_other_settings_are_another_job(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [chat(0, "a question")])
    run(source, output, FakeEngine())
    write_lines(source, [chat(0, "another question")])
    with pytest.raises(ConfigError, match="dtype was None, is int8"):
        run(source, output, FakeEngine(), settings={"dtype": "int8"})
    engine = FakeEngine()
    assert run(source, output, engine, settings={"dtype": "int8"}, is_fresh=True).num_reused == 0


def test_a_batch_file_refuses_a_changed_input_as_before(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [chat(0, "a question")])
    job = BatchJob(source, output, SERVED, "tiny@1")
    run_job(job, FakeCodec(), FakeEngine())
    assert not (tmp_path / "out.jsonl.journal" / "records").exists()
    write_lines(source, [chat(0, "another question")])
    with pytest.raises(ConfigError, match="add --reuse"):
        run_job(job, FakeCodec(), FakeEngine())


def test_keys_that_a_torn_log_misses_match_nothing(tmp_path: Path) -> None:
    from blendserve.job.record_log import RecordKind, RecordLog

    log = RecordLog(tmp_path / "records")
    log.append(RecordKind.OUTPUT_ROW, 1, 0, b"first")
    log.append(RecordKind.OUTPUT_ROW, 9000, 0, b"beyond the keys")
    log.append(RecordKind.KEYS, 1, 0, b"k" * KEY_BYTES)
    log.close()
    kept = KeptAnswers(tmp_path / "records")
    assert kept.take(b"k" * KEY_BYTES) == b"first"
    assert kept.take(b"k" * KEY_BYTES) is None
    assert kept.take(b"x" * KEY_BYTES) is None
    kept.close()
