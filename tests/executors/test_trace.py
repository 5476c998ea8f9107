"""What a run notes of its steps: bounded, even over the run, and true to what the core did."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import random_tokens, random_weights, tiny_spec

from blendserve import _native
from blendserve.config import EngineConfig
from blendserve.costs.hardware import Peaks
from blendserve.costs.model_cost import CostModel
from blendserve.engine.loop import EngineLoop
from blendserve.executors.native import NativeExecutor
from blendserve.executors.trace import SPAN_COLUMNS, StepTrace
from blendserve.planner.plan import make_plan
from blendserve.planner.policies import make_policy
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request, SamplingParams

PEAKS = Peaks(1e9, 2e9, is_measured=False)


def spans(count: int) -> NDArray[np.int64]:
    return np.zeros((count, len(SPAN_COLUMNS)), np.int64)


@pytest.mark.parametrize("num_steps", [1, 9, 100, 4097])
def test_kept_steps_are_few_and_even(num_steps: int) -> None:
    trace = StepTrace(max_spans=50)
    for step in range(num_steps):
        trace.add(float(step), step + 0.5, spans(7) if trace.wants_spans else None)
    kept = [step.step for step in trace.kept]
    assert sum(len(step.spans) for step in trace.kept) <= 50
    assert kept == list(range(0, num_steps, trace.stride))
    assert len(kept) >= min(num_steps, 4)
    assert trace.begin_s.tolist() == list(range(num_steps))
    assert len(trace.end_s) == len(trace) == num_steps


def test_one_step_is_kept_however_large() -> None:
    trace = StepTrace(max_spans=5)
    trace.add(0.0, 1.0, spans(100))
    trace.add(1.0, 2.0, spans(100))
    assert [step.step for step in trace.kept] == [0]


def test_no_spans_unless_wanted() -> None:
    trace = StepTrace()
    assert not trace.wants_spans
    trace.add(0.0, 1.0, spans(3))
    assert trace.kept == ()


def run_traced(trace: StepTrace | None, peaks: Peaks | None = PEAKS) -> tuple[NativeExecutor, EngineLoop]:
    """Six requests on a tiny model, the stats of which are left in the loop."""
    spec = tiny_spec()
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_threads=2)
    executor = NativeExecutor(spec, random_weights(spec), config, num_blocks=64, peaks=peaks, trace=trace)
    prompts = [random_tokens(spec, 20 + 5 * i, seed=i) for i in range(6)]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [Request(i, ids, len(ids), sampling, 6, seed=i) for i, ids in enumerate(prompts)]
    table = request_table((len(ids) for ids in prompts), ((sampling, 6) for _ in prompts))
    plan = make_plan(PrefixTree.from_flat(flatten(prompts)), table, CostModel(1e-6, 1e-9))
    loop = EngineLoop(executor, config)
    assert len(list(loop.run(requests, make_policy("fcfs", plan)))) == 6
    return executor, loop


def test_steps_carry_their_work_at_peak_rates() -> None:
    executor, loop = run_traced(StepTrace())
    counters, steps = executor.counters(), loop.stats.steps.columns()
    flop = counters.matmul_flop + counters.attention_flop
    assert steps["compute_s"].sum() == pytest.approx(flop / PEAKS.flop_per_s)
    assert steps["memory_s"].sum() == pytest.approx((counters.weight_bytes + counters.kv_bytes) / PEAKS.bytes_per_s)
    assert (steps["compute_s"] > 0).all()
    assert (steps["memory_s"] > 0).all()
    _, untold = run_traced(None, peaks=None)
    assert untold.stats.steps.columns()["compute_s"].sum() == 0


def test_spans_lie_within_their_steps_and_apart_on_each_worker() -> None:
    trace = StepTrace(max_spans=10_000)
    executor, loop = run_traced(trace)
    assert len(trace) == loop.stats.num_steps == len(trace.kept)
    assert (trace.begin_s <= trace.end_s).all()
    assert (trace.end_s[:-1] <= trace.begin_s[1:]).all()
    names = _native.op_names()
    for step, rows in trace.kept:
        worker, op, layer, _, begin_ns, end_ns, busy_ns = rows.T
        assert (begin_ns >= trace.begin_s[step] * 1e9 - 1e3).all()
        assert (end_ns <= trace.end_s[step] * 1e9 + 1e3).all()
        assert (busy_ns <= end_ns - begin_ns).all()
        for number in range(executor.num_threads):
            mine = worker == number
            assert (end_ns[mine][:-1] <= begin_ns[mine][1:]).all()
        layers = {layer for index, layer in zip(op, layer, strict=True) if names[index] == "attention"}
        assert layers == {0, 1, 2}
