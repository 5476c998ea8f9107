"""Paths that would lose data or waste a night are refused before any work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from batch_fakes import FakeEngine, batch_line, run_fake, write_lines

from blendserve.errors import BlendServeError, ConfigError
from blendserve.job.writer import check_apart, resolve_paths


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [batch_line("a")])


def assert_refused(input_path: Path, output: Path, words: str, errors: Path | None = None) -> None:
    """No answer was asked for, and nothing was written."""
    engine = FakeEngine()
    before = sorted(input_path.parent.rglob("*"))
    content = input_path.read_bytes() if input_path.is_file() else b""
    with pytest.raises(ConfigError, match=words):
        run_fake(input_path, output, engine, errors_path=errors)
    assert engine.num_answers == 0
    assert sorted(input_path.parent.rglob("*")) == before
    assert not content or input_path.read_bytes() == content


def test_default_names(tmp_path: Path, job_input: Path) -> None:
    paths = resolve_paths(job_input, tmp_path / "out.jsonl")
    assert (paths.errors.name, paths.journal.name) == ("out.errors.jsonl", "out.jsonl.journal")
    assert resolve_paths(job_input, tmp_path / "answers.txt").errors.name == "answers.txt.errors.jsonl"


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "chain", "dots"])
def test_output_that_is_the_input(tmp_path: Path, job_input: Path, link: str) -> None:
    (tmp_path / "sub").mkdir()
    output = tmp_path / "out.jsonl"
    if link == "same":
        output = job_input
    elif link == "dots":
        output = tmp_path / "sub" / ".." / "in.jsonl"
    elif link == "hard":
        os.link(job_input, output)
    else:
        target = job_input
        if link == "chain":
            target = tmp_path / "between"
            target.symlink_to(job_input)
        output.symlink_to(target)
    assert_refused(job_input, output, "is the input file")
    assert_refused(job_input, tmp_path / "other.jsonl", "is the input file", errors=output)


def test_one_file_for_output_and_errors(tmp_path: Path, job_input: Path) -> None:
    assert_refused(job_input, tmp_path / "out.jsonl", "is the output file", errors=tmp_path / "out.jsonl")


def test_files_are_made_beside_neither_the_input_nor_each_other(tmp_path: Path) -> None:
    out, err = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    paths = resolve_paths(tmp_path / "in.jsonl", out, err)
    for made in (paths.partial_of(out), paths.partial_of(err)):
        source = write_lines(made, [batch_line("a")])
        assert_refused(source, out, "is the input file", errors=err)
        source.unlink()
    source = write_lines(tmp_path / "in.jsonl", [batch_line("a")])
    assert_refused(source, out, "is the error file", errors=paths.partial_of(out))
    assert resolve_paths(source, tmp_path / "out2.jsonl", err).partial_of(err) != paths.partial_of(err)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("in.jsonl", "the input file"),
        ("link", "the input file"),
        ("out.jsonl", "the output file"),
        ("out.errors.jsonl", "the error file"),
        ("out.jsonl.journal", "the journal"),
        ("out.jsonl.partial", "where the output file is made"),
        ("report.html", "also --report"),
    ],
)
def test_what_else_a_run_writes_is_no_file_of_the_job(tmp_path: Path, job_input: Path, name: str, what: str) -> None:
    (tmp_path / "link").symlink_to(job_input)
    paths = resolve_paths(job_input, tmp_path / "out.jsonl")
    check_apart(paths, {"--report": tmp_path / "report.html", "--trace": tmp_path / "trace.json"})
    with pytest.raises(ConfigError, match=f"--trace .*{name} is {what}; choose another path"):
        check_apart(paths, {"--report": tmp_path / "report.html", "--trace": tmp_path / name})
    with pytest.raises(ConfigError, match="is where the error file is made"):
        check_apart(paths, {"--report": paths.partial_of(paths.errors)})


def test_an_output_from_elsewhere_is_not_replaced_unasked(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    assert_refused(job_input, output, "--fresh")
    run_fake(job_input, output, is_fresh=True)
    assert "precious" not in output.read_text()


def test_an_empty_file_in_the_place_of_the_output_is_no_obstacle(tmp_path: Path, job_input: Path) -> None:
    (tmp_path / "out.jsonl").touch()
    assert run_fake(job_input, tmp_path / "out.jsonl").num_succeeded == 1


@pytest.mark.parametrize("is_there", [False, True])
def test_a_symbolic_link_to_elsewhere_is_replaced(tmp_path: Path, job_input: Path, is_there: bool) -> None:
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "real.jsonl"
    (tmp_path / "out.jsonl").symlink_to(target)
    if is_there:
        target.write_text("precious\n")
        assert_refused(job_input, tmp_path / "out.jsonl", "is not of this job")
    run_fake(job_input, tmp_path / "out.jsonl", is_fresh=is_there)
    assert not (tmp_path / "out.jsonl").is_symlink()
    assert (target.read_text() if target.exists() else None) == ("precious\n" if is_there else None)


def test_a_link_that_leads_nowhere_is_still_one_file(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.symlink_to(tmp_path / "nowhere")
    assert_refused(job_input, output, "is the output file", errors=output)
    with pytest.raises(ConfigError, match=r"--trace .* is the output file"):
        check_apart(resolve_paths(job_input, output), {"--trace": output})


def test_places_where_nothing_can_be_written(tmp_path: Path, job_input: Path) -> None:
    assert_refused(job_input, tmp_path / "missing" / "out.jsonl", "mkdir -p")
    assert_refused(job_input, job_input / "out.jsonl", "not a directory")
    assert_refused(job_input, tmp_path, "not a regular file")
    assert_refused(job_input, Path("/dev/null"), "not a regular file")
    assert_refused(job_input, Path("/proc/out.jsonl"), "cannot write in /proc")
    assert_refused(job_input, tmp_path / "out.jsonl", "mkdir -p", errors=tmp_path / "missing" / "err.jsonl")
    (tmp_path / "out.jsonl.journal").touch()
    assert_refused(job_input, tmp_path / "out.jsonl", "must be a directory")


def test_inputs_that_cannot_be_read_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name, words in (("missing.jsonl", "No such file"), (".", "directory")):
        with pytest.raises(BlendServeError, match=words):
            run_fake(tmp_path / name, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
