"""From a loaded model to a running engine: limits that follow from the machine, and one planned run of requests.

`LLM` and batch jobs both stand on this; neither builds an engine or a plan of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

from blendserve.batchfile.store import PendingRequests
from blendserve.calibration import matching_calibration
from blendserve.config import (
    BLOCK_SIZE,
    BYTES_PER_WEIGHT,
    Dtype,
    EngineConfig,
    available_memory_bytes,
    cache_dir,
    usable_cores,
)
from blendserve.cost import CostModel, ModelCost
from blendserve.detokenize import StopChecker
from blendserve.engine.loop import EngineLoop
from blendserve.errors import CapacityError, ConfigError
from blendserve.executors.native import NativeExecutor
from blendserve.executors.trace import StepTrace
from blendserve.hardware import OverlapCost, Peaks
from blendserve.models.load import LoadedModel
from blendserve.models.spec import ModelSpec
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.policies import make_policy
from blendserve.planner.sorting import FlatPrompts
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window, WindowedPolicy
from blendserve.request import Request, RequestSource, SequenceOutput

MAX_KV_SHARE = 0.5
"""Share of the available memory that the KV cache takes unless told otherwise; the rest is for weights and the user."""

MAX_THREADS_PER_CORE = 4
MIN_MAX_THREADS = 64
"""More threads than cores wait for each other at every op; thousands of them stand still."""

# One core with 256-bit vectors, until the machine is calibrated: only the ratio of the two matters to a plan.
_FLOP_PER_S_PER_CORE: dict[Dtype, float] = {"bf16": 90e9, "int8": 160e9}
_BYTES_PER_S_PER_CORE = 12e9


def resolve_limits(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """Fill the limits that were left open: KV memory, context length, threads.

    Raises: ConfigError when the context asked for is longer than the model's or the threads are far more than the
    machine has cores, CapacityError when not one block fits.
    """
    most_threads = max(MIN_MAX_THREADS, MAX_THREADS_PER_CORE * (os.cpu_count() or 1))
    if config.num_threads > most_threads:
        raise ConfigError(
            f"num_threads is {config.num_threads}, but this machine has {os.cpu_count()} cores and takes at most "
            f"{most_threads} threads; lower --threads, or leave it out"
        )
    if config.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {spec.name} was made for {spec.max_position} tokens; "
            "lower it, or leave it out"
        )
    max_model_len = config.max_model_len or spec.max_position
    bytes_per_token = spec.kv_bytes_per_token()
    kv_memory_bytes = config.kv_memory_bytes or min(
        int(available_memory_bytes() * MAX_KV_SHARE * config.memory_share),
        config.max_num_seqs * max_model_len * bytes_per_token,
    )
    if kv_memory_bytes < bytes_per_token * BLOCK_SIZE:
        raise CapacityError(
            f"KV memory is {kv_memory_bytes} bytes; one block of {BLOCK_SIZE} tokens of {spec.name} takes "
            f"{bytes_per_token * BLOCK_SIZE}; raise --kv-memory"
        )
    return replace(
        config,
        kv_memory_bytes=kv_memory_bytes,
        max_model_len=max_model_len,
        num_threads=config.num_threads or usable_cores(),
    )


def open_executor(
    model: LoadedModel, config: EngineConfig, *, isa: str = "auto", trace: StepTrace | None = None
) -> NativeExecutor:
    """Load the weights. `config` has resolved limits; `trace` notes what steps do."""
    num_blocks = config.kv_memory_bytes // (model.spec.kv_bytes_per_token() * BLOCK_SIZE)
    return NativeExecutor(
        model.spec,
        model.weights,
        config,
        num_blocks=num_blocks,
        isa=isa,
        peaks=peaks_of(config.num_threads, config.dtype),
        trace=trace,
        overlap_cost=overlap_cost_of(config.num_threads, config.dtype),
    )


def open_engine(model: LoadedModel, config: EngineConfig, *, isa: str = "auto") -> EngineLoop:
    """Load the weights and build an engine on the native executor. `config` has resolved limits."""
    executor = open_executor(model, config, isa=isa)
    return EngineLoop(executor, config, stop_checker=StopChecker(model.tokenizer))


def peaks_of(num_threads: int, dtype: Dtype = "bf16") -> Peaks:
    """What this machine delivers at most: as calibrated, else a built-in guess. A calibration that cannot be used is
    silently none: `cost_of` tells."""
    calibration = matching_calibration(cache_dir(), num_threads, lambda _: None, dtype)
    if calibration is not None:
        return calibration.peaks()
    return Peaks(_FLOP_PER_S_PER_CORE[dtype] * num_threads, _BYTES_PER_S_PER_CORE * num_threads, is_measured=False)


def overlap_cost_of(num_threads: int, dtype: Dtype = "bf16") -> OverlapCost | None:
    """When and how steps overlap on this machine, as calibrated; None where that was not measured, or not on so many
    threads: `cost_of` tells."""
    calibration = matching_calibration(cache_dir(), num_threads, lambda _: None, dtype)
    return None if calibration is None else calibration.overlap_cost()


def cost_of(spec: ModelSpec, num_threads: int, notify: Callable[[str], None], dtype: Dtype = "bf16") -> CostModel:
    """Compute and memory seconds of requests of this model on this machine: as calibrated, else of the built-in ratio
    and without overlap.

    A calibration that cannot be used is told to `notify`.
    """
    model = ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[dtype])
    calibration = matching_calibration(cache_dir(), num_threads, notify, dtype)
    if calibration is not None:
        return calibration.step_cost(model).cost_model()
    return CostModel.at_rates(
        model,
        flop_per_s=_FLOP_PER_S_PER_CORE[dtype] * num_threads,
        bytes_per_s=_BYTES_PER_S_PER_CORE * num_threads,
        has_overlap=False,
    )


@dataclass(frozen=True, slots=True)
class PlannedRequests:
    """A source whose requests carry the plan's block keys, by which prefixes are shared and evicted."""

    source: RequestSource
    tree: PrefixTree

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Request:
        return replace(self.source[index], block_keys=self.tree.block_keys(index, BLOCK_SIZE))


def plan_requests(prompts: FlatPrompts, table: RequestTable, cost: CostModel, *, seed: int = 0) -> Plan:
    """Sort the prompts into a tree and plan them. Shapes: row i of `table` is prompt i."""
    return make_plan(PrefixTree.from_flat(prompts), table, cost, seed=seed)


def plan_pending(
    pending: PendingRequests, table: RequestTable, cost: CostModel, *, block_size: int = BLOCK_SIZE
) -> Plan:
    """Plan what a job has yet to answer. Shapes: row i of `table` is row i of `pending`."""
    return make_plan(pending.prefix_tree(), table, cost, block_size=block_size)


def run_planned(engine: EngineLoop, source: RequestSource, plan: Plan, policy: str) -> Iterator[SequenceOutput]:
    """Run every request of `source` under a policy, yielding outputs as they finish."""
    return engine.run(PlannedRequests(source, plan.tree), make_policy(policy, plan))


def run_windowed(
    engine: EngineLoop, source: RequestSource, windows: Iterator[Window], cost: CostModel, policy: str
) -> Generator[SequenceOutput]:
    """Run requests that arrive in windows, each planned together with what still waits when little does.

    `source` has the requests of all windows taken so far; their block keys name contents.
    """
    yield from engine.run(source, WindowedPolicy(windows, cost, lambda plan: make_policy(policy, plan)))
