"""Separate pools for prefill and decode: each by its own arithmetic, and the slower one decides."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blendserve.costs.hardware import A100_80G
from blendserve.errors import ConfigError
from blendserve.models.known import LLAMA_3_8B
from blendserve.simulator.bounds import job_bounds
from blendserve.simulator.disaggregated import simulate_disaggregated
from blendserve.simulator.simulate import gpu_machine, simulate
from blendserve.simulator.workloads.blend import blend
from blendserve.simulator.workloads.workload import Workload

MACHINE = gpu_machine(A100_80G, LLAMA_3_8B, engine="sequential")


@pytest.fixture(scope="module")
def workload() -> Workload:
    mixed = blend(1.4, 0.35, 2_000, compute_trace="sharegpt")
    return mixed.subset(np.flatnonzero(mixed.kind != mixed.kinds.index("openvid"))[:400])


def test_the_prefill_pool_computes_what_sharing_leaves_in_full_batches(workload: Workload) -> None:
    result = simulate_disaggregated(workload, MACHINE, num_prefill_gpus=2, num_decode_gpus=1)
    num_tokens = int(workload.num_prompt_tokens.sum() - workload.num_shared_tokens.sum())
    batch = MACHINE.max_num_batched_tokens
    assert result.prefill_s == pytest.approx(math.ceil(num_tokens / batch) * MACHINE.cost.compute_s(batch) / 2)


def test_decodes_take_at_least_what_their_reads_and_tokens_take(workload: Workload) -> None:
    result = simulate_disaggregated(workload, MACHINE, num_prefill_gpus=1, num_decode_gpus=1)
    only_decodes = job_bounds(
        workload.num_prompt_tokens,
        workload.num_output_tokens,
        workload.num_prompt_tokens,  # everything shared: no prefill is left
        MACHINE.cost,
        MACHINE.capacity_tokens,
    )
    assert result.decode_s >= only_decodes.memory_s + only_decodes.compute_s
    assert result.decode_s >= only_decodes.longest_s


def test_prompts_cost_the_decode_pool_nothing(workload: Workload) -> None:
    apart = simulate_disaggregated(workload, MACHINE, num_prefill_gpus=1, num_decode_gpus=1)
    together = simulate(workload, MACHINE, "dfs", engine="sequential")
    assert apart.decode_s < together.time_s - 0.8 * apart.prefill_s


def test_the_slower_pool_decides_and_every_gpu_counts(workload: Workload) -> None:
    one = simulate_disaggregated(workload, MACHINE, num_prefill_gpus=1, num_decode_gpus=1)
    two = simulate_disaggregated(workload, MACHINE, num_prefill_gpus=1, num_decode_gpus=2)
    assert two.prefill_s == one.prefill_s
    assert two.decode_s < one.decode_s
    for result, num_gpus in ((one, 2), (two, 3)):
        assert result.time_s == max(result.prefill_s, result.decode_s)
        assert result.tokens_per_s_per_gpu == pytest.approx(workload.num_tokens / result.time_s / num_gpus)


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (1, 0)])
def test_an_empty_pool_is_refused(workload: Workload, prefill: int, decode: int) -> None:
    with pytest.raises(ConfigError, match="leaves a pool empty"):
        simulate_disaggregated(workload, MACHINE, num_prefill_gpus=prefill, num_decode_gpus=decode)
