"""Whole processes that die: by kill -9 at random moments, by a file size limit that stands for a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from batch_fakes import FakeEngine, comparable, mixed_lines, read_rows, run_fake, write_lines
from crash_children import BROKEN, DISK_FULL, FINISHED, exit_code_of, in_child

from blendserve.errors import CapacityError

NUM_LINES = 120
ANSWER_S = 0.001


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_LINES))


@pytest.fixture
def whole(tmp_path: Path, job_input: Path) -> Path:
    run_fake(job_input, tmp_path / "whole.jsonl", is_ordered=True)
    return tmp_path / "whole.jsonl"


def assert_same_files(output: Path, whole: Path) -> None:
    for suffix in (".jsonl", ".errors.jsonl"):
        left, right = output.with_suffix(suffix), whole.with_suffix(suffix)
        assert comparable(left) == comparable(right)
        assert [row["custom_id"] for row in read_rows(left)] == [row["custom_id"] for row in read_rows(right)]


def test_killed_twenty_times_a_job_ends_with_the_files_of_one_that_was_not(
    tmp_path: Path, job_input: Path, whole: Path
) -> None:
    output = tmp_path / "out.jsonl"
    moments = random.Random(20)

    def work(output: Path = output) -> int:
        slow = FakeEngine(moments.choice(["forward", "backward"]), on_answer=lambda _: time.sleep(ANSWER_S))
        run_fake(job_input, output, slow, is_ordered=True)
        return FINISHED

    started_s = time.monotonic()
    work(tmp_path / "timed.jsonl")
    longest_s = (time.monotonic() - started_s) / 3  # so that a job meets about six kills, in any phase
    num_kills = 0
    while num_kills < 20:
        child = in_child(work)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        num_kills += exit_code_of(child) == -signal.SIGKILL
        if output.exists():  # finished between two kills: begin anew, so that every kill meets a running job
            assert_same_files(output, whole)
            output.unlink()
            output.with_suffix(".errors.jsonl").unlink()
    child = in_child(work)
    assert exit_code_of(child) == FINISHED
    assert_same_files(output, whole)


@pytest.mark.parametrize("max_file_bytes", [100, 1_000, 4_000, 8_000, 20_000, 40_000, 60_000])
def test_a_full_disk_ends_a_run_and_a_rerun_goes_on(
    tmp_path: Path, job_input: Path, whole: Path, max_file_bytes: int
) -> None:
    """The limit strikes while reading, while answering, or while writing the files, as it is larger."""
    output = tmp_path / "out.jsonl"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        try:
            run_fake(job_input, output, is_ordered=True)
        except CapacityError as error:
            return DISK_FULL if "free some space" in str(error) else BROKEN
        return FINISHED

    assert exit_code_of(in_child(work)) == DISK_FULL
    assert not output.exists()
    engine = FakeEngine()
    report = run_fake(job_input, output, engine, is_ordered=True)
    assert_same_files(output, whole)
    assert report.num_resumed + engine.num_answers >= report.num_succeeded
    if max_file_bytes >= 20_000:
        assert report.num_resumed > 0


def test_a_killed_process_leaves_no_lock(tmp_path: Path, job_input: Path) -> None:
    started = tmp_path / "started"

    def touch_and_wait(_: int) -> None:
        started.touch()
        time.sleep(60)

    def work() -> int:
        run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=touch_and_wait))
        return FINISHED

    child = in_child(work)
    while not started.exists():
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    assert run_fake(job_input, tmp_path / "out.jsonl").num_lines == NUM_LINES
