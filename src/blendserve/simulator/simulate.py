"""What a job would cost on given hardware: the real loop, batcher, cache and policies around a simulated executor.

Library side of `blendserve simulate`. Baselines are a policy and an engine kind each: vLLM-DFS and SGLang-DFS are
`dfs` on a `sequential` engine, NanoFlow-DFS and NanoFlow-Balance are `dfs` and `random` on an `overlapped` one. All
figures are simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from blendserve.config import EngineConfig
from blendserve.engine.loop import EngineLoop
from blendserve.executors.simulated import SimulatedExecutor
from blendserve.planner.base import Policy, RequestTable
from blendserve.planner.lengths import MeanLengthModel
from blendserve.planner.part_time import PartEngine
from blendserve.planner.partition import partition
from blendserve.planner.plan import LengthsFactory, Plan, make_plan
from blendserve.planner.policies import make_policy
from blendserve.simulator.bounds import Bounds, job_bounds
from blendserve.simulator.machine import EngineKind, Machine
from blendserve.simulator.workloads.knowledge import SAMPLED, GivenLengths, LengthKnowledge, wrong_estimates
from blendserve.simulator.workloads.source import WorkloadSource, prefix_tree
from blendserve.simulator.workloads.workload import Workload

Floats = NDArray[np.float64]
Int64s = NDArray[np.int64]
JOULES_PER_KWH = 3.6e6
MAX_OUTPUT_TOKENS = 8192
"""Cap on outputs that the planner is told: the context of the models. Longer ones (videos) are known."""


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """One replica's run. `num_cached_tokens` are prefix hits of first admissions; `num_recomputed_tokens` what
    admissions after a preemption had to compute again. `steps`: one array per column of the engine's step log,
    [num_steps]; empty unless asked for."""

    time_s: float
    num_steps: int
    num_preemptions: int
    num_cached_tokens: int
    num_recomputed_tokens: int
    scheduling_s: float
    steps: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A simulated job. Times are virtual; `wall_s` is what the simulation itself took.

    `bounds` are those of the whole job on all replicas, for an overlapped engine, whatever the engine was: shares of
    them compare engines. `optimal_sharing` counts whole KV blocks.
    """

    policy: str
    engine: EngineKind
    machine: Machine
    num_replicas: int
    num_requests: int
    num_tokens: int
    num_prompt_tokens: int
    optimal_sharing: float
    bounds: Bounds
    replicas: tuple[ReplicaResult, ...]
    wall_s: float

    @property
    def time_s(self) -> float:
        """Makespan: the slowest replica's."""
        return max(replica.time_s for replica in self.replicas)

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.machine.tensor_parallel

    @property
    def tokens_per_s(self) -> float:
        """Input and output tokens over time, all replicas together."""
        return self.num_tokens / self.time_s

    @property
    def gpu_hours(self) -> float:
        return self.num_gpus * self.time_s / 3600

    @property
    def price(self) -> float:
        """In the currency of the hardware's price per hour."""
        return self.gpu_hours * self.machine.hardware.price_per_hour

    @property
    def energy_kwh(self) -> float:
        """At full board power: an upper estimate."""
        return self.num_gpus * self.time_s * self.machine.hardware.watts / JOULES_PER_KWH

    @property
    def share_of_optimum(self) -> float:
        """T_o / T."""
        return self.bounds.optimum_s / self.time_s

    @property
    def share_of_bound(self) -> float:
        """T_lb / T."""
        return self.bounds.lower_bound_s / self.time_s

    @property
    def sharing(self) -> float:
        """Prompt tokens found in the prefix cache, of all; what preemption computes again is not in it."""
        return sum(replica.num_cached_tokens for replica in self.replicas) / max(1, self.num_prompt_tokens)

    @property
    def sharing_kept(self) -> float:
        """Sharing reached over the most that full blocks allow."""
        return self.sharing / self.optimal_sharing if self.optimal_sharing else 1.0


def make_engine_config(machine: Machine) -> EngineConfig:
    """Limits of a simulated engine; the context is as long as the KV memory."""
    return EngineConfig(
        max_num_seqs=machine.max_num_seqs,
        max_num_batched_tokens=max(machine.max_num_batched_tokens, machine.max_num_seqs),
        max_model_len=machine.capacity_tokens,
    )


def plan_workload(workload: Workload, machine: Machine, lengths: LengthKnowledge, *, seed: int = 0) -> Plan:
    """The offline plan of a workload."""
    known = workload.known_output_tokens
    if lengths.kind == "exact":
        known = workload.num_output_tokens
    elif lengths.kind in ("scaled", "scattered"):  # nothing is certain then, not even what the request itself fixes
        known = np.full(len(workload), -1, dtype=np.int64)
    most = workload.max_output_tokens
    if most is None:
        most = np.full(len(workload), min(machine.capacity_tokens, MAX_OUTPUT_TOKENS), dtype=np.int64)
    table = RequestTable(workload.num_prompt_tokens, np.maximum(most, workload.num_output_tokens), known)
    return make_plan(
        prefix_tree(workload),
        table,
        machine.cost.cost_model(),
        seed=seed,
        sample_rate=lengths.sample_rate,
        lengths=_lengths_factory(workload, lengths, seed),
    )


def _lengths_factory(workload: Workload, lengths: LengthKnowledge, seed: int) -> LengthsFactory | None:
    if lengths.kind in ("scaled", "scattered"):
        estimates = wrong_estimates(workload.num_output_tokens, lengths, seed)
        return lambda _tree, _table: GivenLengths(estimates, learns=lengths.learns)
    if lengths.kind == "means":
        return lambda tree, table: MeanLengthModel(tree, table, sample_rate=lengths.sample_rate, seed=seed)
    return None


def simulate(
    workload: Workload,
    machine: Machine,
    policy: str,
    *,
    engine: EngineKind = "overlapped",
    num_replicas: int = 1,
    lengths: LengthKnowledge = SAMPLED,
    seed: int = 0,
    keeps_steps: bool = False,
    make: Callable[[Plan], Policy] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SimulationResult:
    """Run a workload under a policy on virtual replicas, each with its part of one central plan.

    `make` builds a policy that has no name of its own; `policy` then only labels the result.
    """
    make = make or partial(make_policy, policy)
    began = clock()
    parts = [workload]
    if num_replicas > 1:
        plan = _sampled_plan(workload, machine, lengths, seed)
        parts = [workload.subset(rows) for rows in partition(plan, num_replicas, part_engine(machine)).parts]
    results = [
        _run_replica(part, machine, make, lengths, seed=seed, keeps_steps=keeps_steps, clock=clock) for part in parts
    ]
    return SimulationResult(
        policy=policy,
        engine=engine,
        machine=machine,
        num_replicas=num_replicas,
        num_requests=len(workload),
        num_tokens=workload.num_tokens,
        num_prompt_tokens=int(workload.num_prompt_tokens.sum()),
        optimal_sharing=workload.sharing,
        bounds=_bounds(workload, machine, num_replicas),
        replicas=tuple(results),
        wall_s=clock() - began,
    )


def _run_replica(
    workload: Workload,
    machine: Machine,
    make: Callable[[Plan], Policy],
    lengths: LengthKnowledge,
    *,
    seed: int,
    keeps_steps: bool,
    clock: Callable[[], float],
) -> ReplicaResult:
    plan = plan_workload(workload, machine, lengths, seed=seed)
    executor = SimulatedExecutor(machine.cost, machine.capacity_tokens)
    loop = EngineLoop(executor, make_engine_config(machine), clock=clock)
    num_cached_tokens = 0
    for output in loop.run(WorkloadSource(workload, plan.tree), make(plan)):
        if output.error is not None:
            raise output.error
        num_cached_tokens += output.num_cached_tokens
    stats = loop.stats
    num_first_tokens = int(workload.num_prompt_tokens.sum()) - num_cached_tokens
    return ReplicaResult(
        time_s=stats.executor_s,
        num_steps=stats.num_steps,
        num_preemptions=stats.num_preemptions,
        num_cached_tokens=num_cached_tokens,
        num_recomputed_tokens=stats.num_admitted_tokens - stats.num_cached_tokens - num_first_tokens,
        scheduling_s=stats.scheduling_s,
        steps=stats.steps.columns() if keeps_steps else {},
    )


def _sampled_plan(workload: Workload, machine: Machine, lengths: LengthKnowledge, seed: int) -> Plan:
    """The plan once the samples have finished, which is when a job is divided: their lengths are known then. Every
    replica has its share of the samples to run, so they are counted."""
    plan = plan_workload(workload, machine, lengths, seed=seed)
    if not len(plan.samples):
        return plan
    model = plan.new_lengths()
    for index in plan.samples.tolist():
        model.observe(index, int(workload.num_output_tokens[index]))
    model.refresh()
    return replace(plan, schedule=plan.reschedule(model))


def part_engine(machine: Machine) -> PartEngine:
    """What a partition must know of a replica."""
    cost = machine.cost
    return PartEngine(
        constant_s=cost.constant_s,
        floor_s=cost.weight_floor_s,
        kv_token_s=cost.kv_token_s,
        full_s=cost.memory_s(machine.capacity_tokens),
        interference=cost.interference,
    )


def _bounds(workload: Workload, machine: Machine, num_replicas: int) -> Bounds:
    prompts, outputs = (lengths[workload.order] for lengths in (workload.num_prompt_tokens, workload.num_output_tokens))
    shared = workload.num_shared_tokens
    return job_bounds(
        prompts, outputs, shared, machine.cost, machine.capacity_tokens, machine.overlap, num_replicas=num_replicas
    )
