"""The simulated executor against a twin that walks one entry at a time, inside the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from blendserve.config import EngineConfig
from blendserve.costs.hardware import A100_80G
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import NANOFLOW, SEQUENTIAL, Interference, StepCost, gpu_step_cost
from blendserve.engine.loop import EngineLoop
from blendserve.engine.step import StepPlan, StepResult
from blendserve.errors import CapacityError
from blendserve.executors.simulated import SimulatedExecutor
from blendserve.models.known import LLAMA_3_8B
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import make_plan
from blendserve.planner.policies import make_policy
from blendserve.simulator.workloads.blend import blend
from blendserve.simulator.workloads.source import WorkloadSource, prefix_tree

COST = gpu_step_cost(ModelCost.from_spec(LLAMA_3_8B), A100_80G, has_prefill_attention=True)


def make_plan_of(decodes: list[int], prefills: list[tuple[int, int]]) -> StepPlan:
    """Decodes by computed tokens, prefills by (computed, scheduled)."""
    computed = decodes + [begin for begin, _ in prefills]
    scheduled = [1] * len(decodes) + [count for _, count in prefills]
    size = len(computed)
    return StepPlan(
        slots=np.arange(size, dtype=np.int32),
        num_scheduled_tokens=np.array(scheduled, dtype=np.int32),
        num_computed_tokens=np.array(computed, dtype=np.int32),
        is_sampled=np.arange(size) < max(1, size - 1),  # the last prompt goes on in the next step
        token_ids=np.zeros((0, 0), dtype=np.int32),
        block_tables=np.arange(size * 400, dtype=np.int32).reshape(size, 400),  # none is shared
        num_prefill_tokens=sum(count for _, count in prefills),
        num_decode_tokens=len(decodes),
    )


def twin_step_s(cost: StepCost, plan: StepPlan) -> tuple[float, float, float]:
    """Entry by entry: every token is multiplied, a decode reads its context, a prefill token attends to those before
    it."""
    num_tokens = num_pairs = num_sampled = 0
    num_kv = 0.0
    entries = zip(plan.num_computed_tokens.tolist(), plan.num_scheduled_tokens.tolist(), strict=True)
    read: set[int] = set()
    for entry, (computed, scheduled) in enumerate(entries):
        num_tokens += scheduled
        num_sampled += bool(plan.is_sampled[entry])
        if entry < plan.num_decode_tokens:
            num_kv += computed + 1
            for block in plan.block_tables[plan.slots[entry], : computed // 16].tolist():
                num_kv -= (1 - cost.shared_kv_share) * 16 * (block in read)
                read.add(block)
        else:
            num_pairs += sum(position + 1 for position in range(computed, computed + scheduled))
    compute_s = max(cost.weight_floor_s, cost.constant_s + cost.token_s * num_tokens) + cost.pair_s * num_pairs
    if num_sampled:
        compute_s += max(cost.head_floor_s, cost.head_s * num_sampled)
    memory_s = cost.kv_token_s * num_kv
    a, b = cost.interference.compute_delay, cost.interference.memory_delay
    return max(compute_s + a * memory_s, memory_s + b * compute_s), compute_s, memory_s


@pytest.mark.parametrize(("head_floor_s", "head_s"), [(0.0, 0.0), (0.002, 1e-4)])
@pytest.mark.parametrize("interference", [NANOFLOW, SEQUENTIAL, Interference(0.7, 0.2)])
@pytest.mark.parametrize(
    ("decodes", "prefills"),
    [([100, 2000, 7], [(0, 300), (64, 1)]), ([5000] * 90, []), ([], [(0, 2048)]), ([1], [])],
)
def test_a_step_takes_what_its_entries_add_up_to(
    decodes: list[int], prefills: list[tuple[int, int]], interference: Interference, head_floor_s: float, head_s: float
) -> None:
    cost = replace(COST, interference=interference, head_floor_s=head_floor_s, head_s=head_s)
    executor = SimulatedExecutor(cost, 457_000)
    plan = make_plan_of(decodes, prefills)
    result = executor.execute(plan)
    assert (result.elapsed_s, result.compute_s, result.memory_s) == pytest.approx(twin_step_s(cost, plan))
    assert executor.now_s == result.elapsed_s
    assert len(result.token_ids) == max(1, len(decodes) + len(prefills) - 1)
    executor.execute(plan)
    assert executor.now_s == pytest.approx(2 * result.elapsed_s)


def test_what_decodes_share_may_cost_less() -> None:
    """Of three decodes two share 5 full blocks; 3 of them are the third one's too; a prefill shares for nothing."""
    plan = make_plan_of([100, 90, 50], [(80, 20)])
    plan.block_tables[1, :5] = plan.block_tables[3, :5] = plan.block_tables[0, :5]
    plan.block_tables[2, :3] = plan.block_tables[0, :3]
    apart, half, once = (
        SimulatedExecutor(replace(COST, shared_kv_share=share), 457_000).execute(plan).memory_s / COST.kv_token_s
        for share in (1.0, 0.5, 0.0)
    )
    assert (apart, half, once) == pytest.approx((243, 243 - 64, 243 - 128))


def test_contexts_beyond_32_bits_in_sum_are_counted() -> None:
    executor = SimulatedExecutor(COST, 457_000)
    plan = make_plan_of([2**30] * 4, [])
    assert executor.execute(plan).memory_s == pytest.approx(COST.kv_token_s * 4 * (2**30 + 1))


def test_a_pool_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(CapacityError, match="do not hold one block"):
        SimulatedExecutor(COST, 15)


class CheckedExecutor(SimulatedExecutor):
    """Compares every step of a run with the twin and keeps its elapsed time."""

    def __init__(self, cost: StepCost, capacity_tokens: int) -> None:
        super().__init__(cost, capacity_tokens)
        self.elapsed: list[float] = []

    def execute(self, plan: StepPlan) -> StepResult:
        result = super().execute(plan)
        assert (result.elapsed_s, result.compute_s, result.memory_s) == pytest.approx(twin_step_s(self.cost, plan))
        self.elapsed.append(result.elapsed_s)
        return result


def run(policy: str, shared_kv_share: float = 1.0, num_requests: int = 60) -> Iterator[list[float]]:
    workload = blend(1.4, 0.35, 300, compute_trace="sharegpt").subset(np.arange(num_requests))
    tree = prefix_tree(workload)
    known = workload.num_output_tokens
    plan = make_plan(tree, RequestTable(workload.num_prompt_tokens, known, known), COST.cost_model())
    executor = CheckedExecutor(replace(COST, shared_kv_share=shared_kv_share), 60_000)
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=60_000)
    loop = EngineLoop(executor, config)
    outputs = list(loop.run(WorkloadSource(workload, tree), make_policy(policy, plan)))
    assert sorted(output.index for output in outputs) == list(range(num_requests))
    assert all(output.error is None for output in outputs)
    for output in outputs:
        assert len(output.token_ids) == workload.num_output_tokens[output.index]
    assert loop.stats.executor_s == pytest.approx(executor.now_s) == pytest.approx(sum(executor.elapsed))
    yield executor.elapsed


@pytest.mark.parametrize("policy", ["dfs", "random", "blend"])
def test_a_run_is_timed_step_by_step_and_repeats_exactly(policy: str) -> None:
    (first,), (again,) = run(policy), run(policy)
    assert first == again


def test_a_run_that_reads_shared_prefixes_once_is_timed_step_by_step_too() -> None:
    (apart,), (once,) = run("dfs"), run("dfs", shared_kv_share=0.0)
    assert sum(once) < sum(apart)
