"""Who may read what a job writes: nobody but the user its journal, and its answers whoever may read the questions."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_fakes import batch_line, errors_of, run_fake, stop_after, write_lines

from blendserve.job.interrupts import JobInterrupted


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [*(batch_line(f"id-{number}") for number in range(4)), "{"])


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_journal_is_for_the_user_alone(tmp_path: Path, job_input: Path) -> None:
    directory = tmp_path / "out.jsonl.journal"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(2, KeyboardInterrupt()))
    found = {path.relative_to(directory): mode_of(path) for path in directory.rglob("*")}
    assert len(found) == 11
    assert set(found.values()) == {0o600, 0o700}
    assert mode_of(directory) == 0o700
    directory.chmod(0o755)
    run_fake(job_input, tmp_path / "out.jsonl")
    assert mode_of(directory) == 0o700


@pytest.mark.parametrize(
    ("of_input", "umask", "expected"),
    [(0o600, 0o022, 0o600), (0o640, 0o022, 0o640), (0o664, 0o022, 0o644), (0o644, 0o077, 0o600), (0o755, 0o022, 0o644)],
)
def test_new_files_are_as_private_as_the_input(
    tmp_path: Path, job_input: Path, of_input: int, umask: int, expected: int
) -> None:
    job_input.chmod(of_input)
    os.umask(umask)
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output)
    assert [mode_of(path) for path in (output, errors_of(output))] == [expected, expected]


def test_a_file_that_is_replaced_hands_its_mode_on(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    for path, mode in ((output, 0o600), (errors_of(output), 0o660)):
        path.touch()
        path.chmod(mode)
    run_fake(job_input, output)
    assert [mode_of(path) for path in (output, errors_of(output))] == [0o600, 0o660]
