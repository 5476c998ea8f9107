"""Plans and samples of jobs on tables: what they say, and that a sample is a part of the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import FakeEngine
from table_fakes import PROMPT, TableEngine, run_map, table_of, write_parquet

from blendserve.costs.model_cost import CostModel
from blendserve.engines.base import EngineTimes
from blendserve.job.job import JobReport
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.planner.plan import Plan
from blendserve.report.table_text import plan_json, plan_text, sample_json, sample_text
from blendserve.request import SequenceOutput
from blendserve.tables.layout import Layout
from blendserve.tables.mapping import TableJob, open_table
from blendserve.tables.recipe import Recipe
from blendserve.tables.trial import Sample, plan_table, run_sample

COST = CostModel(token_s=1e-3, kv_token_s=1e-6)


class PlanningEngine(TableEngine):
    """Plans with some cost, and keeps what it was asked."""

    def plan(self, pending: PendingRequests) -> Plan:
        return plan_pending(pending, pending.table(), COST)


def job_on(source: Path, output: Path, recipe: Recipe = PROMPT) -> TableJob:
    return TableJob(open_table(source), str(output), recipe, Layout.of(str(output)), inputs=[str(source)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "in.parquet", table_of(100))


def test_a_sample_is_a_part_of_the_job(tmp_path: Path, source: Path) -> None:
    output, engine = tmp_path / "out.parquet", PlanningEngine()
    sample = run_sample(job_on(source, output), engine, "blend", 10)
    assert isinstance(sample, Sample)
    assert engine.fake.num_answers == len(sample.rows) == 10
    assert sample.num_left == 90
    assert not output.exists()
    numbers = [row.number for row in sample.rows]
    assert numbers == sorted(numbers)
    assert all(row.columns == {"text": f"word {(row.number - 1) % 25}"} for row in sample.rows)
    assert all(row.name == f"in.parquet:{row.number}" for row in sample.rows)
    rest = TableEngine()
    run_map(source, output, engine=rest)
    assert rest.fake.num_answers == 80
    found = pq.read_table(output)["answer"].to_pylist()
    assert [found[row.number - 1] for row in sample.rows] == [row.answer.value for row in sample.rows]


def test_the_estimate_scales_with_the_work(tmp_path: Path, source: Path) -> None:
    sample = run_sample(job_on(source, tmp_path / "out.parquet"), PlanningEngine(), "blend", 9)
    assert isinstance(sample, Sample)
    assert sample.output_tokens == 90 * 6
    assert sample.prompt_tokens == sum(len(f"user:Say word {row % 25}\n") for row in range(100) if row % 10 != 7)
    text, fields = sample_text(sample), sample_json(sample)
    assert "; for all 90 that are left, about:" in text
    assert "  outputs  540 tokens" in text
    assert len(json.loads(json.dumps(fields))["rows"]) == 9


def test_a_sample_of_more_than_there_is_answers_all(tmp_path: Path, source: Path) -> None:
    output, engine = tmp_path / "out.parquet", PlanningEngine()
    sample = run_sample(job_on(source, output), engine, "blend", 1000)
    assert isinstance(sample, Sample)
    assert len(sample.rows) == 90
    report = run_sample(job_on(source, output), engine, "blend", 1000)
    assert isinstance(report, JobReport)
    assert report.num_succeeded == 90
    assert engine.fake.num_answers == 90


def test_a_plan_counts_what_can_be_asked(tmp_path: Path, source: Path) -> None:
    engine = PlanningEngine()
    found = plan_table(job_on(source, tmp_path / "out.parquet"), engine)
    assert (found.num_rows, found.refused_by_code) == (100, {"invalid_row": 10})
    assert found.plan is not None
    assert found.plan.num_requests == 90
    assert engine.fake.num_answers == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]
    text = plan_text("in.parquet", found, 61.0, "blend")
    assert text.startswith("in.parquet: 100 rows, 10 of them cannot be asked (invalid_row 10)\n")
    assert "61.0 s simulated on this machine, policy blend" in text
    assert "--sample measures it" in plan_text("in.parquet", found, None, "blend")
    assert plan_json("in.parquet", found, None)["num_requests"] == 90


def test_a_table_that_cannot_be_asked_has_no_plan(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": pa.nulls(3, pa.string())}))
    found = plan_table(job_on(source, tmp_path / "out.parquet"), PlanningEngine())
    assert plan_text("x", found, None, "blend") == "x: 3 rows, 3 of them cannot be asked (invalid_row 3)"
    assert plan_json("x", found, None)["prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("prompt", "advice"),
    [
        ("{{ key }} {{ city }}", "a prompt that names them in the order city, key would let 9"),
        ("{{ row_fields }}", "--reorder-fields would let 9"),
        ("{{ city }} {{ key }}", ""),
        ("{{ key }}", ""),
    ],
)
def test_a_better_order_of_columns_is_told(tmp_path: Path, prompt: str, advice: str) -> None:
    table = pa.table({"key": [str(row) for row in range(60)], "city": ["Rome " * 40] * 60})
    source = write_parquet(tmp_path / "in.parquet", table)
    found = plan_table(job_on(source, tmp_path / "out.parquet", Recipe(prompt=prompt)), PlanningEngine(FakeEngine()))
    text = plan_text("x", found, None, "blend")
    assert advice in text
    assert ("  columns  " in text) == bool(advice)


STEP_S, TOKEN_S, NUM_SEQS = 50.0, 1.0, 32
"""A machine whose steps take long however few rows they hold, as those of all machines that read weights."""


def machine_s(plan: Plan, factor: float = 1.0) -> float:
    """The time of a planned run on it."""
    outputs = plan.table.known_output_tokens
    num_steps = max(int(outputs.max()), -(-int(outputs.sum()) // NUM_SEQS))
    return factor * (num_steps * STEP_S + plan.tree.num_unique_tokens * TOKEN_S)


class TimedEngine(PlanningEngine):
    """Takes the time of that machine for every run, and very long to load."""

    times = EngineTimes()

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:
        lengths = np.zeros(len(pending), np.int64)
        for output in super().generate(pending, policy):
            lengths[output.index] = output.num_output_tokens
            yield output
        table = replace(pending.table(), known_output_tokens=lengths)
        self.times = EngineTimes(load_s=100.0, run_s=machine_s(plan_pending(pending, table, COST)))


@pytest.mark.parametrize("num_rows", [2, 5, 20])
def test_few_rows_tell_the_time_of_all(tmp_path: Path, num_rows: int) -> None:
    """The simulation is 20% too fast, and the sample corrects it. Without one, the time is far too long."""
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": [f"word {row:03}" for row in range(1000)]}))
    job = job_on(source, tmp_path / "out.parquet")
    found = run_sample(job, TimedEngine(), "blend", num_rows, lambda plan: machine_s(plan, 0.8))
    assert isinstance(found, Sample)
    assert found.is_simulated
    assert "simulated on this machine and corrected by the sample" in sample_text(found)
    whole = TimedEngine()
    run_map(source, tmp_path / "whole.parquet", engine=whole)
    assert found.time_s == pytest.approx(whole.times.run_s, rel=0.1)
    crude = run_sample(job_on(source, tmp_path / "other.parquet"), TimedEngine(), "blend", num_rows)
    assert isinstance(crude, Sample)
    assert not crude.is_simulated
    assert crude.time_s > 1.5 * whole.times.run_s
    assert "at most, and mostly much less" in sample_text(crude)


def test_the_slow_start_of_a_short_sample_is_not_taken_for_its_speed(tmp_path: Path, source: Path) -> None:
    class SlowStart(PlanningEngine):
        times = EngineTimes(run_s=2.0)

    found = run_sample(
        job_on(source, tmp_path / "out.parquet"), SlowStart(), "blend", 2, lambda plan: 0.01 * plan.num_requests
    )
    assert isinstance(found, Sample)
    assert found.num_left * 0.01 < found.time_s < 1.5 * found.num_left * 0.01
