"""Forecasts: the part of a job that is simulated, what is left out, and what follows for the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planner_cases import plan_of

from blendserve.costs.hardware import A100_80G
from blendserve.errors import CapacityError
from blendserve.models.known import LLAMA_3_8B
from blendserve.simulator.forecast import (
    STEPS_PER_REQUEST,
    draw_outputs,
    estimate_steps,
    fit_to,
    forecast,
    planned_workload,
    sample_rows,
    sampled,
    sorted_lcp,
)
from blendserve.simulator.simulate import gpu_machine, simulate
from blendserve.simulator.workloads.blend import blend
from blendserve.simulator.workloads.source import prefix_tree
from blendserve.simulator.workloads.workload import Workload

MACHINE = gpu_machine(A100_80G, LLAMA_3_8B)
PROMPTS = [(1, 2, 3, 4), (1, 2, 3), (1, 2, 3), (5,), (1, 2, 9), (1, 2, 3)]


@pytest.fixture(scope="module")
def workload() -> Workload:
    mixed = blend(1.4, 0.35, 3_000, compute_trace="sharegpt")
    return mixed.subset(np.flatnonzero(mixed.kind != mixed.kinds.index("openvid"))[:600])


def test_a_planned_workload_has_the_tree_of_its_plan() -> None:
    plan = plan_of(PROMPTS, [1, 2, 3, 4, 5, 6])
    workload = planned_workload("job", plan)
    again = prefix_tree(workload)
    assert again.order.tolist() == plan.tree.order.tolist()
    assert again.leaf_lcp.tolist() == plan.tree.leaf_lcp.tolist()
    assert sorted_lcp(plan.tree).tolist() == [0, 3, 3, 3, 2, 0]
    assert workload.num_output_tokens.tolist() == [1, 2, 3, 4, 5, 6]


def test_drawn_outputs_keep_the_caps_and_vary() -> None:
    prompts = [(index,) for index in range(200)]
    drawn = draw_outputs(plan_of(prompts, [0] * 200, is_known=False))
    assert drawn.min() >= 1
    assert drawn.max() <= 64
    assert len(set(drawn.tolist())) > 1
    assert drawn.tolist() == draw_outputs(plan_of(prompts, [0] * 200, is_known=False)).tolist()


@pytest.mark.parametrize(("num_requests", "most"), [(1000, 100), (1000, 999), (65, 64), (10, 3), (5, 1), (4, 9)])
def test_a_sample_is_runs_of_neighbours(num_requests: int, most: int) -> None:
    order = np.random.default_rng(0).permutation(num_requests)
    rows = sample_rows(order, most)
    assert 1 <= len(rows) <= min(most, num_requests)
    assert len(rows) >= min(most, num_requests) // 2
    assert (np.diff(rows) > 0).all()
    positions = np.sort(np.argsort(order)[rows])
    if 64 <= len(rows) < num_requests:
        assert (np.diff(positions) == 1).mean() >= 0.75
        assert positions[0] == 0
        assert positions[-1] == num_requests - 1


def test_the_whole_job_is_what_simulate_says(workload: Workload) -> None:
    found = forecast(workload, {"overlapped": MACHINE}, ["dfs"], sampled(10_000))
    expected = simulate(workload, MACHINE, "dfs")
    (run,) = found.runs
    assert found.is_whole
    assert run.time_s == expected.time_s
    assert run.gpu_hours == pytest.approx(expected.gpu_hours)
    assert run.energy_kwh == pytest.approx(expected.energy_kwh)
    assert run.tokens_per_s == pytest.approx(expected.tokens_per_s)
    assert found.bounds == expected.bounds


def test_a_part_stands_for_the_whole(workload: Workload) -> None:
    whole = forecast(workload, {"overlapped": MACHINE}, ["dfs"], sampled(10_000))
    part = forecast(workload, {"overlapped": MACHINE}, ["dfs"], sampled(150))
    assert not part.is_whole
    assert part.num_simulated <= 150
    assert part.bounds == whole.bounds
    (run,) = part.runs
    assert run.time_s == pytest.approx(part.bounds.lower_bound_s / run.result.share_of_bound)
    assert run.time_s == pytest.approx(whole.runs[0].time_s, rel=0.35)
    assert run.num_tokens == workload.num_tokens
    assert 0 < run.factor < 1


def test_long_outputs_are_sampled_for_their_steps() -> None:
    """Few requests can take very many steps: then fewer are simulated, and no more steps than were allowed."""
    count, length = 500, 16_000
    prompts = [(index,) for index in range(count)]
    videos = planned_workload("videos", plan_of(prompts, [length] * count))
    num_steps = estimate_steps(videos, MACHINE)
    assert num_steps == pytest.approx(count * length * length / 2 / MACHINE.capacity_tokens, rel=0.01)
    part, factor = sampled(500)(videos, MACHINE)
    assert len(part) == int(count * 500 * STEPS_PER_REQUEST / num_steps) < count
    assert factor == 1.0
    part, factor = sampled(100 * count)(videos, MACHINE)
    assert (len(part), factor) == (count, 1.0)


def test_engines_and_policies_are_all_combined(workload: Workload) -> None:
    machines = {engine: gpu_machine(A100_80G, LLAMA_3_8B, engine=engine) for engine in ("overlapped", "sequential")}
    told: list[str] = []
    found = forecast(workload, machines, ["dfs", "random"], sampled(100), notify=told.append)  # type: ignore[arg-type]
    assert [run.name for run in found.runs] == ["dfs", "random", "dfs, sequential", "random, sequential"]
    assert found.best.time_s == min(run.time_s for run in found.runs)
    assert len(told) == 4


def test_what_does_not_fit_is_left_out_and_what_outgrows_is_cut(workload: Workload) -> None:
    longest = int(workload.num_prompt_tokens.max())
    small = replace(MACHINE, capacity_tokens=longest)
    fitting, num_oversized, num_cut = fit_to(workload, small)
    assert num_oversized == int((workload.num_prompt_tokens >= longest).sum()) >= 1
    assert len(fitting) == len(workload) - num_oversized
    total = workload.num_prompt_tokens + workload.num_output_tokens
    assert num_cut == int(((total > longest) & (workload.num_prompt_tokens < longest)).sum())
    assert (fitting.num_prompt_tokens + fitting.num_output_tokens).max() <= longest


def test_nothing_that_fits_is_an_error_with_a_remedy(workload: Workload) -> None:
    with pytest.raises(CapacityError, match="--tensor-parallel"):
        forecast(workload, {"overlapped": replace(MACHINE, capacity_tokens=1)}, ["dfs"], sampled(10))
