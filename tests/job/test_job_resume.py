"""Stopping, resuming, and refusing to resume: whatever stops a job and however often, its files are the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import (
    NUM_JOB_LINES,
    NUM_JOB_REQUESTS,
    FakeCodec,
    FakeEngine,
    batch_line,
    comparable,
    errors_of,
    mixed_lines,
    run_fake,
    stop_after,
    write_lines,
)

from blendserve.dialect.schema import ServedModel
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job import door
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.journal import Journal
from blendserve.job.reader import ReadLimits


@pytest.mark.parametrize("num_answers", [0, 1, 7, 30, 77])
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, job_input: Path, whole: Path, num_answers: int
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted, match=f"{num_answers} of .* run the same command again") as caught:
        run_fake(job_input, output, stop_after(num_answers, KeyboardInterrupt()))
    assert caught.value.exit_code == 130
    assert not output.exists()
    engine = FakeEngine("backward")
    report = run_fake(job_input, output, engine, clock=lambda: 1_800_000_000.0)
    assert report.num_resumed == num_answers
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
    assert engine.num_answers == NUM_JOB_REQUESTS - num_answers


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_signals_that_end_a_job_as_ctrl_c_does(
    tmp_path: Path, job_input: Path, whole: Path, number: signal.Signals, exit_code: int
) -> None:
    def terminate(count: int) -> None:
        if count == 5:
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(JobInterrupted, match=r"5 of .* run the same command again") as caught:
            run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=terminate))
        assert caught.value.exit_code == exit_code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    run_fake(job_input, tmp_path / "out.jsonl")
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def test_the_signal_is_known_where_an_engine_raises_an_interrupt_of_its_own(tmp_path: Path, job_input: Path) -> None:
    """As Ray does."""

    def terminate(count: int) -> None:
        if count == 5:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None

    with pytest.raises(JobInterrupted) as caught:
        run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=terminate))
    assert caught.value.exit_code == 143


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, job_input: Path) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engine = FakeEngine(on_answer=lambda count: os.kill(os.getpid(), signal.SIGHUP) if count == 5 else None)
        assert run_fake(job_input, tmp_path / "out.jsonl", engine).num_lines == NUM_JOB_LINES
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_while_reading_loses_nothing(tmp_path: Path, job_input: Path, whole: Path) -> None:
    class InterruptedCodec(FakeCodec):
        def encode(self, prompts: Any) -> Any:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match="before any request"):
        run_fake(job_input, tmp_path / "out.jsonl", codec=InterruptedCodec())
    run_fake(job_input, tmp_path / "out.jsonl")
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def test_a_resumed_job_does_not_encode_again(tmp_path: Path, job_input: Path) -> None:
    with pytest.raises(ExecutorError, match="broke"):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(9, ExecutorError("the executor broke")))
    codec = FakeCodec()
    run_fake(job_input, tmp_path / "out.jsonl", codec=codec)
    assert codec.num_calls == 0


def test_a_journal_cut_anywhere_resumes_to_the_same_files(tmp_path: Path, job_input: Path, whole: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(60, KeyboardInterrupt()))
    records = tmp_path / "out.jsonl.journal" / "records"
    header = json.loads((records.parent / "header.json").read_text())
    content = records.read_bytes()
    random = np.random.default_rng(5)
    for length in random.integers(header["num_ingest_bytes"], len(content), 12).tolist():
        records.write_bytes(content[:length])
        with pytest.raises(JobInterrupted):  # stop again before the journal is sealed
            run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    report = run_fake(job_input, output)
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
    assert report.num_resumed >= 3


def test_a_journal_that_lost_what_was_read_is_refused(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    (tmp_path / "out.jsonl.journal" / "records").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"damaged.*--fresh"):
        run_fake(job_input, output)
    run_fake(job_input, output, is_fresh=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("created"), r"header\.json is damaged.*--fresh"),
        (lambda fields: fields.pop("identity"), r"header\.json is damaged.*--fresh"),
        (lambda fields: fields.update(identity=3), r"header\.json is damaged.*--fresh"),
        (lambda fields: fields.update(format=3), r"journal format 3; .*--fresh"),
        (lambda fields: fields.update(created=3), r"header\.json is damaged.*--fresh"),
    ],
)
def test_a_header_that_cannot_be_understood_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, job_input: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    header = tmp_path / "out.jsonl.journal" / "header.json"
    fields = json.loads(header.read_text())
    change(fields)
    header.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        run_fake(job_input, output)


def test_a_finished_job_is_not_run_again(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = run_fake(job_input, output)
    content = output.read_bytes()
    engine = FakeEngine()
    again = run_fake(job_input, output, engine)
    assert again.was_complete
    assert engine.num_answers == 0
    assert (again.num_succeeded, again.errors_by_code, again.notes) == (
        first.num_succeeded,
        first.errors_by_code,
        first.notes,
    )
    assert output.read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "out.jsonl.journal").iterdir()) == [
        "complete.json",
        "lines",
        "lock",
    ]
    run_fake(job_input, output, engine, is_fresh=True)
    assert engine.num_answers > 0


def test_a_finished_job_whose_files_changed_is_refused_and_one_whose_output_is_gone_runs(
    tmp_path: Path, job_input: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output)
    with pytest.raises(ConfigError, match="--ordered --fresh"):
        run_fake(job_input, output, is_ordered=True)
    with output.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ConfigError, match="changed since"):
        run_fake(job_input, output)
    output.unlink()
    assert not run_fake(job_input, output).was_complete


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"dtype": "int8"}}, "dtype was None, is int8"),
        (
            {"served": ServedModel(("tiny", "models/tiny"), vocab_size=256, max_model_len=1024)},
            r"--max-model-len\) was 2048",
        ),
        ({"served": ServedModel(("tiny",), vocab_size=256, max_model_len=2048)}, "model names"),
        ({"limits": ReadLimits(max_line_bytes=5000)}, "the limit of bytes in a line"),
        ({"limits": ReadLimits(max_line_requests=50)}, "--max-line-requests was 2048, is 50"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_journal_of_other_settings_is_refused(
    tmp_path: Path, job_input: Path, changes: dict[str, Any], words: str, is_finished: bool
) -> None:
    output = tmp_path / "out.jsonl"
    if is_finished:
        run_fake(job_input, output)
    else:
        with pytest.raises(JobInterrupted):
            run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    with pytest.raises(ConfigError, match=f"another job.*{words}.*--fresh"):
        run_fake(job_input, output, **changes)


def test_a_journal_of_another_input_is_refused(tmp_path: Path, job_input: Path) -> None:
    with pytest.raises(JobInterrupted):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(3, KeyboardInterrupt()))
    write_lines(job_input, [*mixed_lines(NUM_JOB_LINES), batch_line("one more")])
    with pytest.raises(ConfigError, match=r"whose input was another one, or was changed since: add --reuse"):
        run_fake(job_input, tmp_path / "out.jsonl")
    assert run_fake(job_input, tmp_path / "out.jsonl", is_fresh=True).num_lines == NUM_JOB_LINES + 1


def test_a_job_in_use_is_refused(tmp_path: Path, job_input: Path) -> None:
    def start_again(count: int) -> None:
        if count == 2:
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
                run_fake(job_input, tmp_path / "out.jsonl", is_fresh=True)

    report = run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=start_again))
    assert report.num_lines == NUM_JOB_LINES


def stopped(job_input: Path, output: Path, **fields: Any) -> None:
    """A job that has a journal, and no files yet."""
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(3, KeyboardInterrupt()), **fields)


@pytest.mark.parametrize("last", ["{", batch_line("good")], ids=["with error rows", "without"])
def test_a_job_never_replaces_or_removes_an_error_file_that_is_not_its_own(tmp_path: Path, last: Any) -> None:
    """Neither before the work of a resumed job nor at the end of one that had begun before the file came."""
    shared, output = tmp_path / "errors.jsonl", tmp_path / "out.jsonl"
    source = write_lines(tmp_path / "in.jsonl", [*(batch_line(f"id-{number}") for number in range(5)), last])
    stopped(source, output, errors_path=shared)
    shared.write_text("precious\n")
    engine = FakeEngine()
    with pytest.raises(ConfigError, match=r"errors\.jsonl exists \(9 bytes\) and is not of this job; move it away"):
        run_fake(source, output, engine, errors_path=shared)
    assert (shared.read_text(), engine.num_answers) == ("precious\n", 0)
    shared.unlink()

    def put_there(_: int) -> None:
        shared.write_text("precious\n")

    with pytest.raises(ConfigError, match="is not of this job"):
        run_fake(source, output, FakeEngine(on_answer=put_there), errors_path=shared)
    assert shared.read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.jsonl", "in.jsonl", "out.jsonl.journal"]
    shared.unlink()
    run_fake(source, output, errors_path=shared)
    assert shared.exists() == (last == "{")


def test_outputs_with_and_without_an_ending_do_not_share_an_error_file(tmp_path: Path, job_input: Path) -> None:
    stopped(job_input, tmp_path / "a")
    run_fake(job_input, tmp_path / "a.jsonl")
    content = (tmp_path / "a.errors.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"a\.errors\.jsonl exists .* not of this job"):
        run_fake(job_input, tmp_path / "a")
    assert (tmp_path / "a.errors.jsonl").read_bytes() == content


@pytest.mark.parametrize("is_finished", [False, True])
def test_another_error_file_is_refused(tmp_path: Path, job_input: Path, is_finished: bool) -> None:
    output, mine = tmp_path / "out.jsonl", tmp_path / "mine.jsonl"
    if is_finished:
        run_fake(job_input, output, errors_path=mine)
    else:
        stopped(job_input, output, errors_path=mine)
    with pytest.raises(ConfigError, match=r"error file is .*mine\.jsonl, .*--errors .*mine\.jsonl.*--fresh"):
        run_fake(job_input, output)
    run_fake(job_input, output, errors_path=mine)
    assert mine.exists()
    assert not errors_of(output).exists()


def test_a_crash_between_the_files_and_the_seal_leaves_them_the_jobs_own(
    tmp_path: Path, job_input: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"

    def crash(*_: Any, **__: Any) -> None:
        raise OSError("power cut")

    for target, name in ((Journal, "write_seal"), (door, "replace_files")):
        monkeypatch.setattr(target, name, crash)
        with pytest.raises(OSError, match="power cut"):
            run_fake(job_input, output)
        monkeypatch.undo()
    run_fake(job_input, output)
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
