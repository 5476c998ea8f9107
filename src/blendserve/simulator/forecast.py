"""What a job would take under policies and engines, by simulating it; of a large job a part, chosen so that prefixes
stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from blendserve.errors import CapacityError
from blendserve.planner.base import Int64s
from blendserve.planner.plan import Plan
from blendserve.planner.tree import PrefixTree
from blendserve.simulator.bounds import Bounds, job_bounds
from blendserve.simulator.simulate import JOULES_PER_KWH, EngineKind, Machine, SimulationResult, simulate
from blendserve.simulator.workloads.workload import Workload

_RUN_REQUESTS = 64
"""Neighbours of the sorted order that are taken together into a part: sharing inside them is kept."""
STEPS_PER_REQUEST = 10
"""Bounds the time of a simulation, of which every step takes a fraction of a millisecond."""
_MIN_RUNS = 16
_MIN_FITTING = 32


class Part(NamedTuple):
    """What is simulated in place of a job, and the share of the machine that it gets (`Machine.shrunk`)."""

    workload: Workload
    factor: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """One simulated run, and what follows for the whole job: its bound over the share of the bound that the run had.

    `factor` is the part of the machine that the run had; steps of the whole machine are that much longer. Units:
    seconds, tokens; `price` in the currency of the hardware's price.
    """

    result: SimulationResult
    time_s: float
    num_tokens: int
    factor: float = 1.0

    @property
    def name(self) -> str:
        return self.result.policy if self.result.engine == "overlapped" else f"{self.result.policy}, sequential"

    @property
    def tokens_per_s(self) -> float:
        """Input and output tokens over time, all replicas together."""
        return self.num_tokens / self.time_s if self.time_s else 0.0

    @property
    def gpu_hours(self) -> float:
        return self.result.num_gpus * self.time_s / 3600

    @property
    def price(self) -> float:
        return self.gpu_hours * self.result.machine.hardware.price_per_hour

    @property
    def energy_kwh(self) -> float:
        """At full board power: an upper estimate."""
        return self.result.num_gpus * self.time_s * self.result.machine.hardware.watts / JOULES_PER_KWH

    @property
    def num_preemptions(self) -> int:
        return sum(replica.num_preemptions for replica in self.result.replicas)


@dataclass(frozen=True, slots=True)
class Forecasts:
    """All runs of a job, or of a part that stands for it, on one kind of machine.

    `bounds` are of the whole job, `root_density` at the machine's rates. `num_oversized` requests do not fit its KV
    memory and are left out, as a run would refuse them; `num_cut` would outgrow it and are cut short.
    """

    machine: Machine
    num_replicas: int
    num_requests: int
    num_simulated: int
    num_oversized: int
    num_cut: int
    num_prompt_tokens: int
    num_output_tokens: int
    optimal_sharing: float
    root_density: float
    bounds: Bounds
    runs: tuple[Forecast, ...]

    @property
    def is_whole(self) -> bool:
        return self.num_simulated == self.num_requests - self.num_oversized

    @property
    def best(self) -> Forecast:
        return min(self.runs, key=lambda run: run.time_s)


def forecast(
    workload: Workload,
    machine_by_engine: Mapping[EngineKind, Machine],
    policies: Sequence[str],
    part_of: Callable[[Workload, Machine], Part],
    *,
    num_replicas: int = 1,
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> Forecasts:
    """Simulate every policy on every engine; `part_of` chooses what stands for the requests that fit the machine.

    Raises: CapacityError when no request fits.
    """
    machine = next(iter(machine_by_engine.values()))
    fitting, num_oversized, num_cut = fit_to(workload, machine)
    if not len(fitting):
        raise CapacityError(
            f"none of {len(workload)} requests fits the {machine.capacity_tokens} tokens of KV memory that "
            f"{machine.tensor_parallel} x {machine.hardware.name} leaves beside {machine.model.name}; name hardware "
            "with more memory, or raise --tensor-parallel"
        )
    part, factor = part_of(fitting, machine)
    bounds = _bounds(fitting, machine, num_replicas)
    runs = []
    for engine, of_engine in machine_by_engine.items():
        for policy in policies:
            notify(f"simulating {policy} on the {engine} engine: {len(part)} requests")
            result = simulate(
                part,
                of_engine if part is fitting else of_engine.shrunk(factor),
                policy,
                engine=engine,
                num_replicas=num_replicas,
                seed=seed,
                keeps_steps=True,
            )
            time_s = result.time_s if part is fitting else bounds.lower_bound_s / result.share_of_bound
            runs.append(Forecast(result, time_s, fitting.num_tokens, factor))
    return Forecasts(
        machine=machine,
        num_replicas=num_replicas,
        num_requests=len(workload),
        num_simulated=len(part),
        num_oversized=num_oversized,
        num_cut=num_cut,
        num_prompt_tokens=int(workload.num_prompt_tokens.sum()),
        num_output_tokens=int(workload.num_output_tokens.sum()),
        optimal_sharing=workload.sharing,
        root_density=fitting.cost(machine.cost.cost_model()).density,
        bounds=bounds,
        runs=tuple(runs),
    )


def sampled(max_requests: int) -> Callable[[Workload, Machine], Part]:
    """A chooser of parts: runs of neighbours, on a machine so small that caches and tails weigh as they do in the whole
    job, yet dozens of the longest requests fit and the steps stay within `STEPS_PER_REQUEST` per request.
    """

    def part_of(workload: Workload, machine: Machine) -> Part:
        num_steps, max_steps = estimate_steps(workload, machine), STEPS_PER_REQUEST * max_requests
        most = max(1, min(max_requests, int(len(workload) * max_steps / num_steps)))
        if len(workload) <= most:
            return Part(workload, 1.0)
        part = workload.subset(sample_rows(workload.order, most))
        share = len(part) / len(workload)
        longest = int((part.num_prompt_tokens + part.num_output_tokens).max())
        room = _MIN_FITTING * longest / machine.capacity_tokens
        return Part(part, min(1.0, max(share, room, share * num_steps / max_steps)))

    return part_of


def estimate_steps(workload: Workload, machine: Machine) -> float:
    """About how many steps a job takes: decodes as the KV memory or the limit on sequences allows, then its prompts."""
    prompts, outputs = workload.num_prompt_tokens, workload.num_output_tokens
    num_read = float(np.sum(outputs * (prompts + outputs / 2)))
    decodes = max(num_read / machine.capacity_tokens, float(outputs.sum()) / machine.max_num_seqs)
    return decodes + float(prompts.sum()) / machine.max_num_batched_tokens + 1.0


def planned_workload(name: str, plan: Plan, *, seed: int = 0) -> Workload:
    """The job without its tokens. Output lengths that are not known are drawn from the planner's own distributions."""
    tree, table = plan.prompt_tree, plan.table
    return Workload(
        name=name,
        num_prompt_tokens=table.num_prompt_tokens,
        num_output_tokens=draw_outputs(plan, seed=seed),
        known_output_tokens=table.known_output_tokens,
        kind=np.zeros(len(table), dtype=np.int64),
        kinds=(name,),
        order=tree.order,
        lcp=sorted_lcp(tree),
        max_output_tokens=np.maximum(table.max_output_tokens, 1),
    )


def draw_outputs(plan: Plan, *, seed: int = 0) -> Int64s:
    """One output length per request, every quantile of its estimate as often. Shapes: int64[num_requests]."""
    requests = np.arange(plan.num_requests)
    quantiles = plan.new_lengths().quantiles(requests, np.zeros(plan.num_requests, dtype=np.int64))
    column = np.random.default_rng(seed).permutation(plan.num_requests) % quantiles.shape[1]
    drawn: Int64s = np.maximum(1, np.rint(quantiles[requests, column])).astype(np.int64)
    return drawn


def sorted_lcp(tree: PrefixTree) -> Int64s:
    """Tokens that each request shares with the one before it in sorted order. Shapes: int64[num_requests]."""
    lcp: Int64s = tree.leaf_len[tree.leaf_of[tree.order]]
    lcp[tree.leaf_start[:-1]] = tree.leaf_lcp
    return lcp


def sample_rows(order: Int64s, max_requests: int) -> Int64s:
    """At most `max_requests` file rows, ascending: runs of neighbours in sorted order, evenly spread over it."""
    most = min(max_requests, len(order))
    length = max(1, min(_RUN_REQUESTS, most // _MIN_RUNS))
    num_runs = most // length
    starts = np.linspace(0, len(order) - length, num_runs).round().astype(np.int64)
    return np.sort(order[np.unique(starts[:, None] + np.arange(length))])


def fit_to(workload: Workload, machine: Machine) -> tuple[Workload, int, int]:
    """The requests that fit the machine's KV memory, how many do not, and how many outputs are cut to do so."""
    room = machine.capacity_tokens - workload.num_prompt_tokens
    most = np.maximum(room, 1)
    is_cut = (workload.num_output_tokens > room) & (room >= 1)
    cut = replace(
        workload,
        num_output_tokens=np.minimum(workload.num_output_tokens, most),
        known_output_tokens=np.minimum(workload.known_output_tokens, most),
        max_output_tokens=None if workload.max_output_tokens is None else np.minimum(workload.max_output_tokens, most),
    )
    rows = np.flatnonzero(room >= 1)
    num_oversized = len(workload) - len(rows)
    return (cut.subset(rows) if num_oversized else cut), num_oversized, int(is_cut.sum())


def _bounds(workload: Workload, machine: Machine, num_replicas: int) -> Bounds:
    return job_bounds(
        workload.num_prompt_tokens[workload.order],
        workload.num_output_tokens[workload.order],
        workload.num_shared_tokens,
        machine.cost,
        machine.capacity_tokens,
        machine.overlap,
        num_replicas=num_replicas,
    )
