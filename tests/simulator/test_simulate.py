"""Simulated jobs: bounds that nothing beats, shares, replicas, and what the planner may know."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.costs.hardware import A100_80G
from blendserve.costs.step_cost import NANOFLOW, SEQUENTIAL, StepCost
from blendserve.errors import ConfigError
from blendserve.models.known import LLAMA_3_8B
from blendserve.planner.lengths import LengthModel, MeanLengthModel
from blendserve.planner.policies import make_policy
from blendserve.simulator.bounds import job_bounds
from blendserve.simulator.losses import LOSSES, PHASES, losses_s
from blendserve.simulator.machine import EngineKind, Machine, gpu_machine
from blendserve.simulator.simulate import plan_workload, simulate
from blendserve.simulator.workloads.blend import blend
from blendserve.simulator.workloads.knowledge import EXACT, GivenLengths, LengthKnowledge, wrong_estimates
from blendserve.simulator.workloads.workload import Workload

MACHINE = gpu_machine(A100_80G, LLAMA_3_8B)


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Short enough to simulate in a second: no videos, so no run of tens of thousands of steps."""
    mixed = blend(1.4, 0.35, 3_000, compute_trace="sharegpt")
    return mixed.subset(np.flatnonzero(mixed.kind != mixed.kinds.index("openvid"))[:1500])


def test_bounds_by_hand() -> None:
    cost = StepCost(weight_floor_s=0.5, constant_s=0.25, token_s=1.0, kv_token_s=0.1, interference=NANOFLOW)
    bounds = job_bounds([10, 20], [3, 1], [0, 15], cost, capacity_tokens=11)
    assert bounds.compute_s == 10 + 2 + 5
    assert bounds.memory_s == pytest.approx(0.1 * (11 + 12))
    assert bounds.num_steps == pytest.approx(23 / 11)
    assert bounds.optimum_s == pytest.approx(17 + 2.3 / 2)
    assert bounds.lower_bound_s == pytest.approx(17 + 0.25 * 23 / 11 + 2.3 / 2)
    half = job_bounds([10, 20], [3, 1], [0, 15], cost, capacity_tokens=11, num_replicas=2)
    assert half.lower_bound_s == pytest.approx(bounds.lower_bound_s / 2)


def test_bounds_of_an_engine_that_reads_shared_prefixes_once() -> None:
    """Of the 23 tokens that the first request's two decodes read, 8 are its neighbour's too."""
    cost = StepCost(0.5, 0.25, 1.0, 0.1, interference=NANOFLOW, shared_kv_share=0.25)
    assert job_bounds([10, 20], [3, 1], [0, 8], cost, capacity_tokens=11).memory_s == pytest.approx(0.1 * (23 - 12))
    assert job_bounds([20, 10], [1, 3], [0, 8], cost, capacity_tokens=11).memory_s == pytest.approx(0.1 * (23 - 12))


def test_bounds_count_the_head_once_per_output() -> None:
    cost = StepCost(0.5, 0.25, 1.0, 0.1, interference=SEQUENTIAL)
    with_head = replace(cost, head_floor_s=0.125, head_s=0.0625)
    bounds, more = (job_bounds([10, 20], [3, 1], [0, 15], each, capacity_tokens=11) for each in (cost, with_head))
    assert more.compute_s == bounds.compute_s + 4 * 0.0625
    assert more.longest_s == pytest.approx(bounds.longest_s + 2 * 0.125)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=5), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_no_division_of_a_job_beats_the_bound_of_replicas(sizes: list[tuple[int, int]], num_replicas: int) -> None:
    """Every division, each part as fast as its own bound and its longest request's steps allow."""
    cost = StepCost(weight_floor_s=0.5, constant_s=0.25, token_s=0.1, kv_token_s=0.05, interference=NANOFLOW)
    capacity = 100
    prompts, outputs = (np.array(column) for column in zip(*sizes, strict=True))

    def part_s(rows: list[int]) -> float:
        if not rows:
            return 0.0
        alone = job_bounds(prompts[rows], outputs[rows], [0] * len(rows), cost, capacity)
        num_steps = max(alone.num_steps, float(outputs[rows].max()) - 1)
        return NANOFLOW.step_s(alone.compute_s + cost.constant_s * num_steps, alone.memory_s)

    best_s = min(
        max(part_s([row for row in range(len(sizes)) if owner[row] == part]) for part in range(num_replicas))
        for owner in product(range(num_replicas), repeat=len(sizes))
    )
    bound = job_bounds(prompts, outputs, [0] * len(sizes), cost, capacity, num_replicas=num_replicas)
    assert bound.lower_bound_s <= max(best_s, bound.longest_s) * (1 + 1e-9)


def test_losses_add_up_to_the_time_beyond_the_bound(workload: Workload) -> None:
    result = simulate(workload, MACHINE, "blend", keeps_steps=True)
    parts = losses_s(result.replicas[0].steps, result.bounds, MACHINE.cost, MACHINE.capacity_tokens, MACHINE.overlap)
    assert set(parts) == set(LOSSES)
    assert sum(parts.values()) == pytest.approx(result.time_s - result.bounds.lower_bound_s)
    assert all(parts[f"{phase}_mix"] >= -1e-9 for phase in PHASES)


def test_a_job_cannot_end_before_its_longest_request() -> None:
    cost = StepCost(weight_floor_s=0.5, constant_s=0.25, token_s=0.001, kv_token_s=0.0001, interference=SEQUENTIAL)
    bounds = job_bounds([10], [1001], [0], cost, capacity_tokens=1_000_000)
    assert bounds.lower_bound_s == bounds.longest_s == pytest.approx(1000 * 0.5 + 0.0001 * (10_000 + 500_500))


@pytest.mark.parametrize("policy", ["fcfs", "dfs", "random", "longest-first", "blend"])
@pytest.mark.parametrize("engine", ["overlapped", "sequential"])
def test_nothing_beats_the_bounds(workload: Workload, policy: str, engine: EngineKind) -> None:
    part = workload.subset(np.arange(400))
    result = simulate(part, gpu_machine(A100_80G, LLAMA_3_8B, engine=engine), policy, engine=engine)
    assert 0 < result.share_of_optimum <= result.share_of_bound <= 1
    assert result.sharing_kept <= 1 + 1e-9
    assert result.num_requests == 400
    assert result.tokens_per_s == pytest.approx(part.num_tokens / result.time_s)


def test_nothing_beats_the_bounds_where_shared_prefixes_are_read_once(workload: Workload) -> None:
    part, machine = workload.subset(np.arange(400)), gpu_machine(A100_80G, LLAMA_3_8B)
    once = replace(machine, cost=replace(machine.cost, shared_kv_share=0.0))
    results = [simulate(part, each, "dfs") for each in (machine, once)]
    assert results[1].time_s < results[0].time_s
    assert 0 < results[1].share_of_bound <= 1


def test_overlap_is_never_slower_than_one_after_the_other(workload: Workload) -> None:
    sequential = simulate(workload, gpu_machine(A100_80G, LLAMA_3_8B, engine="sequential"), "dfs", engine="sequential")
    overlapped = simulate(workload, MACHINE, "dfs")
    assert overlapped.time_s < sequential.time_s
    assert sequential.bounds == overlapped.bounds


def test_steps_add_up_to_the_time(workload: Workload) -> None:
    (replica,) = simulate(workload, MACHINE, "blend", keeps_steps=True).replicas
    steps = replica.steps
    assert len(steps["elapsed_s"]) == replica.num_steps
    assert steps["elapsed_s"].sum() == pytest.approx(replica.time_s)
    expected = NANOFLOW.steps_s(steps["compute_s"], steps["memory_s"])
    assert steps["elapsed_s"] == pytest.approx(expected)


def test_the_same_simulation_twice_is_the_same(workload: Workload) -> None:
    first, again = (simulate(workload, MACHINE, "blend") for _ in range(2))
    assert first.replicas[0].time_s == again.replicas[0].time_s
    assert first.replicas[0].num_steps == again.replicas[0].num_steps


def test_costs_follow_from_time(workload: Workload) -> None:
    result = simulate(workload, MACHINE, "dfs")
    assert result.gpu_hours == pytest.approx(result.time_s / 3600)
    assert result.energy_kwh == pytest.approx(result.time_s * 400 / 3.6e6)
    assert result.price == 0


def test_replicas_share_the_work(workload: Workload) -> None:
    one = simulate(workload, MACHINE, "dfs")
    two = simulate(workload, MACHINE, "dfs", num_replicas=2)
    assert len(two.replicas) == two.num_gpus == 2
    assert two.time_s < one.time_s
    assert two.bounds.optimum_s == pytest.approx(one.bounds.optimum_s / 2)
    assert two.num_requests == one.num_requests
    assert two.sharing <= one.sharing
    assert two.sharing_kept > 0.9


@pytest.mark.parametrize(
    "knowledge",
    [EXACT, LengthKnowledge("scaled", 2.0), LengthKnowledge("scaled", 0.5), LengthKnowledge("scattered", 2.0)],
)
def test_every_kind_of_knowledge_serves_everything(workload: Workload, knowledge: LengthKnowledge) -> None:
    result = simulate(workload.subset(np.arange(300)), MACHINE, "blend", lengths=knowledge)
    assert result.share_of_bound > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["overlapped", "sequential"])
def test_blend_keeps_up_with_dfs_where_there_is_no_long_output(engine: EngineKind) -> None:
    """Chats and questions alone: hardly anything to balance, and steps must not be spread over what may never come."""
    mixed = blend(1.4, 0.35, 12_000, compute_trace="sharegpt")
    chats = mixed.subset(np.flatnonzero(mixed.kind != mixed.kinds.index("openvid"))[:3000])
    machine = gpu_machine(A100_80G, LLAMA_3_8B, engine=engine).shrunk(0.3)
    dfs, blended = (simulate(chats, machine, policy, engine=engine).time_s for policy in ("dfs", "blend"))
    assert blended <= 1.01 * dfs


def test_means_know_less_than_distributions(workload: Workload) -> None:
    kinds = (LengthKnowledge("means"), LengthKnowledge("sampled"))
    means, distributions = (plan_workload(workload, MACHINE, kind).new_lengths() for kind in kinds)
    assert isinstance(means, MeanLengthModel)
    assert isinstance(distributions, LengthModel)
    assert len(means.samples) <= len(distributions.samples) <= 2 * len(means.samples)


def test_a_policy_may_be_given_instead_of_named(workload: Workload) -> None:
    part = workload.subset(np.arange(200))
    given = simulate(part, MACHINE, "by hand", make=lambda plan: make_policy("dfs", plan))
    assert given.policy == "by hand"
    assert given.time_s == simulate(part, MACHINE, "dfs").time_s


def test_given_lengths_outlive_their_estimate() -> None:
    lengths = GivenLengths(np.array([50.0, 4.0]))
    indices = np.array([0, 1])
    assert lengths.estimate(indices).tolist() == [50, 4]
    assert lengths.remaining(indices, np.array([20, 8])).tolist() == [30, 2]
    assert lengths.quantiles(indices, np.array([20, 8])).shape == (2, 1)


def test_given_lengths_are_corrected_by_what_finishes_if_they_may() -> None:
    indices = np.array([0, 1])
    learning, stubborn = (GivenLengths(np.array([50.0, 4.0]), learns=learns) for learns in (True, False))
    for lengths in (learning, stubborn):
        lengths.observe(0, 0)
        lengths.observe(1, 8)
        lengths.refresh()
    assert learning.estimate(indices).tolist() == [100, 8]
    assert learning.num_observed == 1
    assert stubborn.estimate(indices).tolist() == [50, 4]


def test_wrong_estimates_are_off_by_the_factor() -> None:
    truth = np.full(50, 10)
    assert set(wrong_estimates(truth, LengthKnowledge("scaled", 0.5), 0)) == {5.0}
    assert set(wrong_estimates(truth, LengthKnowledge("scattered", 2.0), 0)) == {5.0, 20.0}


def test_an_unknown_engine_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlapped"):
        gpu_machine(A100_80G, LLAMA_3_8B, engine="magic")  # type: ignore[arg-type]


def test_kv_in_int8_holds_more_tokens_and_is_read_faster() -> None:
    wide, narrow = gpu_machine(A100_80G, LLAMA_3_8B), gpu_machine(A100_80G, LLAMA_3_8B, kv_dtype="int8")
    share = (128 + 2) / (2 * 128)  # of the bytes: a scale of two bytes for each head of 128
    assert narrow.capacity_tokens == pytest.approx(wide.capacity_tokens / share, rel=1e-5)
    assert narrow.cost.kv_token_s == pytest.approx(wide.cost.kv_token_s * share)


def test_tensor_parallel_replicas_count_their_gpus(workload: Workload) -> None:
    machine: Machine = gpu_machine(A100_80G, LLAMA_3_8B, tensor_parallel=2)
    result = simulate(workload.subset(np.arange(100)), machine, "dfs")
    assert result.num_gpus == 2
    assert result.gpu_hours == pytest.approx(2 * result.time_s / 3600)
