"""Prefill and decode on separate GPUs (DistServe, xPyD) as a simulation of its own, because each pool has its own
memory.

Optimistic for the system it stands for: prefills run in full batches in depth-first order with perfect reuse, the KV
moves for free, and no decode ever waits for a prefill. The decode pool is the real loop whose prefills cost nothing.
Engines do not overlap operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from blendserve.config import EngineConfig
from blendserve.engine.loop import EngineLoop
from blendserve.engine.step import StepPlan
from blendserve.errors import ConfigError
from blendserve.executors.simulated import SimulatedExecutor
from blendserve.planner.policies import make_policy
from blendserve.simulator.simulate import Machine, plan_workload
from blendserve.simulator.workloads.knowledge import SAMPLED
from blendserve.simulator.workloads.source import WorkloadSource
from blendserve.simulator.workloads.workload import Workload


class DecodeExecutor(SimulatedExecutor):
    """A decode GPU: tokens that arrive with their KV computed elsewhere cost no time."""

    def num_multiplied_tokens(self, plan: StepPlan) -> int:
        return plan.num_decode_tokens


@dataclass(frozen=True, slots=True)
class DisaggregatedResult:
    """A simulated xPyD job. Units: seconds, virtual."""

    num_prefill_gpus: int
    num_decode_gpus: int
    prefill_s: float
    decode_s: float
    num_tokens: int

    @property
    def time_s(self) -> float:
        """The slower pool decides."""
        return max(self.prefill_s, self.decode_s)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.num_tokens / self.time_s / (self.num_prefill_gpus + self.num_decode_gpus)


def simulate_disaggregated(
    workload: Workload, machine: Machine, *, num_prefill_gpus: int, num_decode_gpus: int
) -> DisaggregatedResult:
    """Run a workload on separate pools of `machine`s. Raises: ConfigError when a pool is empty."""
    if num_prefill_gpus < 1 or num_decode_gpus < 1:
        raise ConfigError(f"{num_prefill_gpus}P{num_decode_gpus}D leaves a pool empty; each needs at least one GPU")
    order = workload.order
    decode_s = max(
        _decode_s(workload.subset(np.sort(order[part::num_decode_gpus])), machine) for part in range(num_decode_gpus)
    )
    return DisaggregatedResult(
        num_prefill_gpus=num_prefill_gpus,
        num_decode_gpus=num_decode_gpus,
        prefill_s=_prefill_s(workload, machine) / num_prefill_gpus,
        decode_s=decode_s,
        num_tokens=workload.num_tokens,
    )


def _prefill_s(workload: Workload, machine: Machine) -> float:
    """Full batches of everything that sharing leaves to compute."""
    num_tokens = int(workload.num_prompt_tokens.sum() - workload.num_shared_tokens.sum())
    batch = machine.max_num_batched_tokens
    return math.ceil(num_tokens / batch) * machine.cost.compute_s(batch)


def _decode_s(workload: Workload, machine: Machine) -> float:
    capacity = machine.capacity_tokens
    config = EngineConfig(max_num_seqs=machine.max_num_seqs, max_num_batched_tokens=capacity, max_model_len=capacity)
    plan = plan_workload(workload, replace(machine, max_num_batched_tokens=capacity), SAMPLED)
    loop = EngineLoop(DecodeExecutor(machine.cost, capacity), config)
    for output in loop.run(WorkloadSource(workload, plan.tree), make_policy("dfs", plan)):
        if output.error is not None:
            raise output.error
    return loop.stats.executor_s
