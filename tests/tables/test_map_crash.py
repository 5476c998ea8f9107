"""Whole processes that are killed while they read, answer or write a table, and tables that change in between."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import FakeEngine
from crash_children import DISK_FULL, FINISHED, exit_code_of, in_child
from table_fakes import TableEngine, run_map, table_of, write_parquet

from blendserve.errors import CapacityError

NUM_ROWS = 60
ANSWER_S = 0.001


@pytest.mark.parametrize("rows_per_file", [None, 13])
def test_killed_at_any_moment_a_job_ends_with_the_table_of_one_that_was_not(
    tmp_path: Path, rows_per_file: int | None
) -> None:
    source, output = write_parquet(tmp_path / "in.parquet", table_of(NUM_ROWS)), tmp_path / "out"
    output = output if rows_per_file else output.with_suffix(".parquet")
    whole = tmp_path / "whole.parquet"
    run_map(source, whole)
    moments = random.Random(rows_per_file)

    def work(target: Path = output) -> int:
        slow = FakeEngine(moments.choice(["forward", "backward"]), on_answer=lambda _: time.sleep(ANSWER_S))
        run_map(source, target, engine=TableEngine(slow), rows_per_file=rows_per_file)
        return FINISHED

    started_s = time.monotonic()
    work(tmp_path / f"timed{output.suffix}")
    longest_s = (time.monotonic() - started_s) / 2
    num_kills = 0
    while num_kills < 15:
        child = in_child(work)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        num_kills += exit_code_of(child) == -signal.SIGKILL
    child = in_child(work)
    assert exit_code_of(child) == FINISHED
    assert pq.read_table(output).equals(pq.read_table(whole))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(output.name)) == [
        output.name,
        f"{output.name}.journal",
    ]


def test_a_table_that_grows_between_kills_costs_every_row_once(tmp_path: Path) -> None:
    """Every answer that was given before a kill is kept, but for those on their way to the journal."""
    output, counted = tmp_path / "out.parquet", tmp_path / "answers"
    moments = random.Random(7)
    num_rows = 20
    while num_rows < NUM_ROWS:
        source = write_parquet(tmp_path / "in.parquet", table_of(num_rows))

        def work(source: Path = source) -> int:
            def count(_: int) -> None:
                with counted.open("ab") as file:
                    file.write(b".")
                time.sleep(ANSWER_S)

            run_map(source, output, engine=TableEngine(FakeEngine(on_answer=count)))
            return FINISHED

        child = in_child(work)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        exit_code_of(child)
        num_rows += 4
    report = run_map(write_parquet(source, table_of(NUM_ROWS)), output)
    assert report.num_succeeded == NUM_ROWS - NUM_ROWS // 10
    num_given = counted.stat().st_size if counted.exists() else 0
    num_kept = report.num_reused + report.num_resumed
    assert num_given - 10 <= num_kept <= num_given, "each of ten kills may cost the answer under way"
    run_map(tmp_path / "in.parquet", tmp_path / "whole.parquet")
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))


@pytest.mark.parametrize("max_file_bytes", [100, 2_000, 4_000, 9_000])
def test_a_full_disk_ends_a_job_and_the_same_command_goes_on(tmp_path: Path, max_file_bytes: int) -> None:
    table = pa.table({"text": [f"{row} " * 40 for row in range(40)]})
    source, output = write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.jsonl"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        try:
            run_map(source, output)
        except CapacityError as error:
            return DISK_FULL if "free some space" in str(error) else 1
        return FINISHED

    assert exit_code_of(in_child(work)) == DISK_FULL
    assert not output.exists()
    run_map(source, output)
    assert len(output.read_text().splitlines()) == 40
