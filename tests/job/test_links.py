"""What somebody else may prepare in a shared directory: links to files of the user, and journals of another user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from batch_fakes import FakeEngine, batch_line, run_fake, stop_after, write_lines

from blendserve.errors import ConfigError
from blendserve.job.disk import create_new, open_own, replace_durably
from blendserve.job.interrupts import JobInterrupted

PARTS = ("lock", "records", "records.partial", "header.json", "header.json.partial", "complete.json", "prompts")


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [*(batch_line(f"id-{number}") for number in range(4)), "{"])


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("precious\n")
    return path


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("is_fresh", [False, True])
def test_a_part_of_a_journal_that_is_a_link_is_refused(
    tmp_path: Path, job_input: Path, precious: Path, part: str, is_fresh: bool
) -> None:
    directory = tmp_path / "out.jsonl.journal"
    directory.mkdir()
    (directory / "lock").touch()
    (directory / part).unlink(missing_ok=True)
    (directory / part).symlink_to(precious)
    with pytest.raises(ConfigError, match=f"{part} is a symbolic link.*another file"):
        run_fake(job_input, tmp_path / "out.jsonl", is_fresh=is_fresh)
    assert precious.read_text() == "precious\n"


def test_a_journal_that_is_a_link_or_open_to_everybody_is_refused(tmp_path: Path, job_input: Path) -> None:
    directory, elsewhere = tmp_path / "out.jsonl.journal", tmp_path / "elsewhere"
    elsewhere.mkdir()
    directory.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        run_fake(job_input, tmp_path / "out.jsonl")
    assert list(elsewhere.iterdir()) == []
    directory.unlink()
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ConfigError, match=r"everybody may write to \(mode 777\)"):
        run_fake(job_input, tmp_path / "out.jsonl")


def test_a_journal_of_another_user_is_refused(tmp_path: Path, job_input: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobInterrupted):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(2, KeyboardInterrupt()))
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {owner}, and you are user {owner + 1}"):
        run_fake(job_input, tmp_path / "out.jsonl")


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_files_in_the_making_are_not_written_through_links(
    tmp_path: Path, job_input: Path, precious: Path, link: str
) -> None:
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    if link == "symbolic":
        partial.symlink_to(precious)
    else:
        os.link(precious, partial)
    run_fake(job_input, output)
    assert precious.read_text() == "precious\n"
    assert output.read_text().count("\n") == 4
    assert not output.is_symlink()


def test_a_link_put_into_a_journal_while_it_runs_is_not_written_through(
    tmp_path: Path, job_input: Path, precious: Path
) -> None:
    def prepare(_: int) -> None:
        (tmp_path / "out.jsonl.journal" / "header.json.partial").symlink_to(precious)

    run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=lambda count: None if count else prepare(count)))
    assert precious.read_text() == "precious\n"


def test_own_files_are_opened_without_following_links(tmp_path: Path, precious: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        open_own(link, os.O_RDWR | os.O_CREAT)
    os.close(create_new(link))
    assert (link.is_symlink(), stat.S_IMODE(link.stat().st_mode)) == (False, 0o600)
    (tmp_path / "new.partial").symlink_to(precious)
    replace_durably(tmp_path / "new", b"content")
    assert ((tmp_path / "new").read_bytes(), precious.read_text()) == (b"content", "precious\n")
