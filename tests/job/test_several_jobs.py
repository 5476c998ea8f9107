"""Several jobs as one plan: every file gets the rows that it gets alone, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import (
    SERVED,
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
from crash_children import exit_code_of, in_child

from blendserve.errors import ConfigError
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.pending import PendingRequests
from blendserve.job.places import choose_outputs, find_inputs, output_for
from blendserve.job.run import run_jobs


def sources_in(directory: Path) -> list[Path]:
    """Files of different sizes, whose ids and prompts overlap; one of bad lines only."""
    directory.mkdir()
    few: list[Any] = [batch_line("id-0"), batch_line("only here")]
    contents: list[list[Any]] = [mixed_lines(40), mixed_lines(13), few, ["{bad"]]
    return [write_lines(directory / f"{name}.jsonl", lines) for name, lines in zip("abcd", contents, strict=True)]


def run_all(sources: Sequence[Path], outputs: Sequence[Path], engine: Any = None, **fields: Any) -> list[JobReport]:
    jobs = [
        BatchJob(source, output, SERVED, "tiny@1", **fields) for source, output in zip(sources, outputs, strict=True)
    ]
    return run_jobs(jobs, FakeCodec(), engine or FakeEngine(), clock=lambda: 1_700_000_000.0)


def assert_as_alone(sources: Sequence[Path], outputs: Sequence[Path], tmp_path: Path) -> None:
    for source, output in zip(sources, outputs, strict=True):
        alone = tmp_path / f"alone-{source.name}"
        run_fake(source, alone)
        assert comparable(output) == comparable(alone)
        assert errors_of(output).exists() == errors_of(alone).exists()
        if errors_of(alone).exists():
            assert comparable(errors_of(output)) == comparable(errors_of(alone))


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_every_file_gets_the_rows_that_it_gets_alone(tmp_path: Path, order: str) -> None:
    sources = sources_in(tmp_path / "in")
    outputs = choose_outputs(sources, None)
    engine = FakeEngine(order)
    reports = run_all(sources, outputs, engine)
    assert [report.num_lines for report in reports] == [40, 13, 2, 1]
    assert [report.exit_code for report in reports] == [3, 3, 0, 3]
    assert_as_alone(sources, outputs, tmp_path)
    again = run_all(sources, outputs, engine)
    assert all(report.was_complete for report in again)


def test_all_requests_come_as_one_run_with_their_own_tokens(tmp_path: Path) -> None:
    sources = sources_in(tmp_path / "in")
    seen: list[PendingRequests] = []

    def generate(pending: PendingRequests) -> Any:
        seen.append(pending)
        return FakeEngine()(pending)

    run_all(sources, choose_outputs(sources, None), generate)
    (joined,) = seen
    parts: list[PendingRequests] = []

    def generate_alone(pending: PendingRequests) -> Any:
        parts.append(pending)
        return FakeEngine()(pending)

    for source in sources[:3]:
        run_fake(source, tmp_path / f"alone-{source.name}", generate_alone)
    requests = [part[row] for part in parts for row in range(len(part))]
    assert len(joined) == len(requests)
    for row, alone in enumerate(requests):
        ours = joined[row]
        assert list(ours.prompt_token_ids) == list(alone.prompt_token_ids)
        assert (ours.sampling, ours.seed) == (alone.sampling, alone.seed)
        assert ours.max_output_tokens == alone.max_output_tokens
    limits = [part.table().max_output_tokens for part in parts]
    assert joined.table().max_output_tokens.tolist() == np.concatenate(limits).tolist()
    assert joined.prefix_tree().num_prompt_tokens == sum(part.prefix_tree().num_prompt_tokens for part in parts)
    assert joined.prefix_tree().num_unique_tokens < sum(part.prefix_tree().num_unique_tokens for part in parts)


def test_a_file_is_written_when_its_last_line_is_done(tmp_path: Path) -> None:
    sources = sources_in(tmp_path / "in")
    outputs = choose_outputs(sources, None)
    written: list[list[str]] = []
    engine = FakeEngine(on_answer=lambda _: written.append([path.name for path in outputs if path.exists()]))
    run_all(sources, outputs, engine)
    assert written[0] == []
    assert written[-1] == ["a.out.jsonl", "b.out.jsonl"]


def test_an_interrupted_run_goes_on_file_by_file(tmp_path: Path) -> None:
    sources = sources_in(tmp_path / "in")
    outputs = choose_outputs(sources, None)
    with pytest.raises(JobInterrupted, match=r"90 of \d+ requests are finished and kept beside the outputs"):
        run_all(sources, outputs, stop_after(90, KeyboardInterrupt()))
    assert outputs[0].exists()
    assert not outputs[2].exists()
    engine = FakeEngine()
    reports = run_all(sources, outputs, engine)
    assert [report.was_complete for report in reports] == [True, False, False, False]
    assert_as_alone(sources, outputs, tmp_path)
    alone = run_fake(sources[1], outputs[1])
    assert alone.was_complete, "a job alone goes on with what several have done together"


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    sources = sources_in(tmp_path / "in")
    outputs, moments = choose_outputs(sources, None), random.Random(7)

    def work() -> int:
        run_all(sources, outputs, FakeEngine(moments.choice(["forward", "backward"]), lambda _: time.sleep(0.001)))
        return 0

    for _ in range(12):
        child = in_child(work)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        exit_code_of(child)
    assert exit_code_of(in_child(work)) == 0
    assert_as_alone(sources, outputs, tmp_path)


def test_files_that_would_meet_are_refused_before_any_work(tmp_path: Path) -> None:
    first, second, *_ = sources_in(tmp_path / "in")
    one = tmp_path / "one.jsonl"
    for outputs in ([one, one], [one, first], [one, tmp_path / "one.errors.jsonl"]):
        with pytest.raises(ConfigError, match="give every input an output of its own"):
            run_all([first, second], outputs)
    assert list(tmp_path.glob("*")) == [tmp_path / "in"]


def test_outputs_and_inputs_by_name(tmp_path: Path) -> None:
    assert output_for(Path("a/in.jsonl.gz")) == Path("a/in.out.jsonl")
    assert output_for(Path("in.json"), Path("d")) == Path("d/in.out.jsonl")
    assert output_for(Path("in")) == Path("in.out.jsonl")
    names = ["b.jsonl", "a.jsonl.zst", "a.out.jsonl", "a.out.errors.jsonl", ".hidden.jsonl", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "x.jsonl.journal").mkdir()
    assert find_inputs([tmp_path, Path("z.jsonl")]) == [tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl", Path("z.jsonl")]
    with pytest.raises(ConfigError, match="directory without batch files"):
        find_inputs([tmp_path / "x.jsonl.journal"])
    inputs = [Path("a.jsonl"), Path("b.jsonl")]
    assert choose_outputs(inputs, tmp_path) == [tmp_path / "a.out.jsonl", tmp_path / "b.out.jsonl"]
    with pytest.raises(ConfigError, match="would hold the answers to 2 files; give -o a directory"):
        choose_outputs(inputs, tmp_path / "one.jsonl")
    with pytest.raises(ConfigError, match="mkdir -p"):
        choose_outputs(inputs, tmp_path / "missing", is_directory=True)


def test_the_answers_are_told_as_they_come_earlier_ones_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(20))
    told: list[bytes] = []
    jobs = [BatchJob(source, tmp_path / "out.jsonl", SERVED, "tiny@1")]
    with pytest.raises(JobInterrupted):
        run_jobs(jobs, FakeCodec(), stop_after(12, KeyboardInterrupt()), on_answer=told.append)
    before = list(told)
    told.clear()
    run_jobs(jobs, FakeCodec(), FakeEngine(), on_answer=told.append)
    assert told[: len(before)] == before
    assert b"".join(told) == (tmp_path / "out.jsonl").read_bytes()
    assert len({json.loads(row)["custom_id"] for row in told}) == len(told)
