"""`run_batch` from Python: on settings and on an engine that is open, resumed, interrupted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_fakes import batch_line, read_rows, write_lines
from tiny_files import tiny_directory

import blendserve
from blendserve import JobProgress, NativeSettings, run_batch
from blendserve.cli import main
from blendserve.engines.opening import open_engine
from blendserve.errors import ConfigError

NUM_LINES = 6


@pytest.fixture
def settings(tmp_path: Path) -> NativeSettings:
    model = str(tiny_directory(tmp_path / "tiny"))
    return NativeSettings(model, kv_memory_bytes=4 << 20, max_num_seqs=4, max_num_batched_tokens=64, num_threads=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [*(batch_line(f"r{n}") for n in range(NUM_LINES)), "no json"])


def test_a_file_is_answered_and_a_second_call_finds_it_done(
    settings: NativeSettings, source: Path, tmp_path: Path
) -> None:
    counts: list[int] = []
    options = {"engine": settings, "ordered": True, "on_progress": lambda progress: counts.append(progress.num_done)}
    report = run_batch(str(source), tmp_path / "out.jsonl", errors=tmp_path / "bad.jsonl", **options)  # type: ignore[arg-type]
    assert (report.num_succeeded, report.num_failed, report.errors_path) == (NUM_LINES, 1, str(tmp_path / "bad.jsonl"))
    assert [row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")] == [f"r{n}" for n in range(NUM_LINES)]
    assert counts == list(range(NUM_LINES + 1))
    again = run_batch(source, tmp_path / "out.jsonl", errors=tmp_path / "bad.jsonl", engine=settings, ordered=True)
    assert again.was_complete


def test_an_open_engine_serves_several_files_and_stays_open(
    settings: NativeSettings, source: Path, tmp_path: Path
) -> None:
    engine = open_engine(settings)
    reports = [run_batch(source, tmp_path / f"{name}.jsonl", engine=engine, policy=name) for name in ("dfs", "blend")]
    assert [report.num_succeeded for report in reports] == [NUM_LINES] * 2
    answers = [
        {row["custom_id"]: row["response"]["body"]["choices"] for row in read_rows(tmp_path / f"{name}.jsonl")}
        for name in ("dfs", "blend")
    ]
    assert answers[0] == answers[1]
    assert engine.stats is not None
    assert engine.status() is not None
    engine.close()


def test_the_command_and_the_function_are_one_job(settings: NativeSettings, source: Path, tmp_path: Path) -> None:
    """What one has finished the other finds: the journal knows them for the same."""
    run_batch(source, tmp_path / "out.jsonl", engine=settings)
    command = ["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(settings.model)]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert main([*command, "--kv-memory", "4MiB", "--quiet"]) == 3, "the file has a bad line"
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_wrong_policy_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown policy 'best'; known: blend"):
        run_batch(source, tmp_path / "out.jsonl", policy="best")
    assert not list(tmp_path.glob("out*"))


def test_an_interrupt_says_how_to_go_on(settings: NativeSettings, source: Path, tmp_path: Path) -> None:
    def stop(progress: JobProgress) -> None:
        if progress.num_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(blendserve.JobInterrupted, match=r"2 of 6 requests are finished .* run the same command"):
        run_batch(source, tmp_path / "out.jsonl", engine=settings, on_progress=stop)
    report = run_batch(source, tmp_path / "out.jsonl", engine=settings)
    assert report.num_resumed >= 2
    assert len(read_rows(tmp_path / "out.jsonl")) == NUM_LINES


def test_everything_public_is_there() -> None:
    for name in blendserve.__all__:
        assert getattr(blendserve, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blendserve.nothing
