"""File systems that refuse what a job relies on: one line that says what to do, and nothing lost."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import FakeEngine, comparable, run_fake

from blendserve.errors import BlendServeError, ConfigError
from blendserve.job.record_log import RecordLog


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks(tmp_path: Path, job_input: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    engine = FakeEngine()
    with pytest.raises(ConfigError, match=f"cannot lock .*journal: {os.strerror(code)}; write to a local disk"):
        run_fake(job_input, tmp_path / "out.jsonl", engine)
    assert engine.num_answers == 0


def test_a_disk_that_turns_read_only(
    tmp_path: Path, job_input: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel does with one that has errors."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def turn(count: int) -> None:
        if count == 9:
            monkeypatch.setattr(os, "pwrite", refuse)

    with pytest.raises(BlendServeError, match=r"Read-only file system; finished .* run the same command again"):
        run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=turn))
    monkeypatch.undo()
    assert run_fake(job_input, tmp_path / "out.jsonl").num_resumed == 9
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def test_a_clock_that_jumps_changes_neither_rows_nor_when_records_are_safe(
    tmp_path: Path, job_input: Path, whole: Path
) -> None:
    times = iter([1_700_000_000.0, -5.0, 9e9])
    with pytest.raises(BlendServeError):
        run_fake(job_input, tmp_path / "out.jsonl", broken_after(7), clock=lambda: next(times))
    run_fake(job_input, tmp_path / "out.jsonl", clock=lambda: next(times))
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def broken_after(num_answers: int) -> FakeEngine:
    def on_answer(count: int) -> None:
        if count == num_answers:
            raise BlendServeError("broken")

    return FakeEngine(on_answer=on_answer)


def test_a_log_whose_clock_goes_back_still_syncs_by_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    log = RecordLog(tmp_path / "log", sync_records=4, sync_interval_s=1.0, clock=lambda: now[0])
    synced: list[float] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(now[0]))
    for _ in range(12):
        now[0] -= 100.0
        log.append(1, 1, 0, b"x")  # type: ignore[arg-type]
    assert len(synced) == 3
    log.close()
