"""Steps made by hand on the native engine with random weights, and how often to repeat them: what calibration and
benchmarks measure with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np

from blendserve.config import BLOCK_SIZE, Dtype, EngineConfig, KvDtype
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.stored_calibration import CalibrationEffort
from blendserve.engine.step import Int32s, StepPlan
from blendserve.executors.native import Floats, NativeCounters, NativeExecutor
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import expected_shapes

T = TypeVar("T")
Clock = Callable[[], float]

_MATMUL_OPS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. `num_layers` of weights and `kv_bytes` (plus a quarter per thread) have to exceed the
    caches; no step beyond `longest_step_s` is tried; each of three phases takes `phase_s` and at least `min_rounds`.

    `has_all_trials`: also measure fewer threads, and cores that do different work. Overlap is tried with at most
    `max_overlap_settings` on `num_overlap_layers`; not at all once half of `total_s` is over."""

    num_layers: int
    token_counts: tuple[int, ...]
    longest_step_s: float
    phase_s: float
    max_rounds: int
    kv_bytes: int = 128 << 20
    name: CalibrationEffort = "thorough"
    min_rounds: int = 3
    has_all_trials: bool = True
    max_overlap_settings: int = 4
    num_overlap_layers: int = 30
    total_s: float = math.inf


class Work(NamedTuple):
    """One step: its time by kind of op, and what was done in it."""

    elapsed_s: float
    matmul_s: float
    attention_s: float
    matmul_flop: float
    attention_flop: float
    weight_bytes: float
    kv_bytes: float

    @property
    def matmul_flop_per_s(self) -> float:
        return self.matmul_flop / self.matmul_s

    @property
    def kv_bytes_per_s(self) -> float:
        return self.kv_bytes / self.attention_s


class SyntheticWeights:
    """Small random numbers in the shapes of a spec; every tensor is a view of the same ones."""

    def __init__(self, spec: ModelSpec) -> None:
        self._shape_by_name = expected_shapes(spec)
        largest = max(prod(shape) for shape in self._shape_by_name.values())
        self._values = np.random.default_rng(0).uniform(-0.05, 0.05, largest).astype(np.float32)

    @property
    def shape_by_name(self) -> Mapping[str, tuple[int, ...]]:
        return self._shape_by_name

    def tensor(self, name: str, /) -> Floats:
        shape = self._shape_by_name[name]
        return self._values[: prod(shape)].reshape(shape)


class Probe:
    """A native executor with steps made by hand. The KV blocks of a sequence lie anywhere, as they do after a while of
    running: side by side they would be read 6 to 8% faster. Close it after use."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_threads: int,
        num_sequences: int,
        max_tokens: int,
        context: int,
        dtype: Dtype = "bf16",
        kv_dtype: KvDtype = "bf16",
    ) -> None:
        blocks_each = -(-context // BLOCK_SIZE)
        config = EngineConfig(
            max_num_seqs=num_sequences,
            max_num_batched_tokens=max(max_tokens, num_sequences),
            max_model_len=blocks_each * BLOCK_SIZE,
            num_threads=num_threads,
            overlap="off",
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        num_blocks = num_sequences * blocks_each
        self._executor = NativeExecutor(spec, SyntheticWeights(spec), config, num_blocks=num_blocks)
        self._token_ids = np.zeros((num_sequences, config.max_model_len), dtype=np.int32)
        blocks = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self._block_tables = blocks.reshape(num_sequences, blocks_each)

    def touch(self) -> None:
        """Write one token into every KV block: memory that was never written is not read from memory. Each block stands
        in for a sequence's first, so that this costs next to no attention."""
        num_sequences, blocks_each = self._block_tables.shape
        slots = np.arange(num_sequences, dtype=np.int32)
        for block in range(blocks_each):
            self._run(slots, 1, 0, np.ascontiguousarray(self._block_tables[:, block : block + 1]))

    def prefill(self, num_tokens: int) -> Work:
        """The first tokens of one sequence."""
        return self._run(np.zeros(1, dtype=np.int32), num_tokens, 0, self._block_tables)

    def decode(self) -> Work:
        """One token of every sequence at the end of its context."""
        num_sequences, context = self._token_ids.shape
        return self._run(np.arange(num_sequences, dtype=np.int32), 1, context - 1, self._block_tables)

    def mixed(self, num_prompt_tokens: int) -> Work:
        """One token of every sequence but the last at the end of its context, and the first tokens of the last one; of
        the last one as well where there are none."""
        num_sequences, context = self._token_ids.shape
        num_tokens = np.ones(num_sequences, dtype=np.int32)
        num_computed = np.full(num_sequences, context - 1, dtype=np.int32)
        if num_prompt_tokens:
            num_tokens[-1], num_computed[-1] = num_prompt_tokens, 0
        slots = np.arange(num_sequences, dtype=np.int32)
        return self._run_each(slots, num_tokens, num_computed, self._block_tables)

    def set_overlap(self, mode: str, cost: OverlapCost) -> None:
        self._executor.set_overlap(mode, cost)

    def close(self) -> None:
        self._executor.close()

    def _run(self, slots: Int32s, num_tokens: int, num_computed: int, blocks: Int32s) -> Work:
        def each(value: int) -> Int32s:
            return np.full(len(slots), value, dtype=np.int32)

        return self._run_each(slots, each(num_tokens), each(num_computed), blocks)

    def _run_each(self, slots: Int32s, num_tokens: Int32s, num_computed: Int32s, blocks: Int32s) -> Work:
        is_sampled = np.zeros(len(slots), dtype=np.bool_)
        plan = StepPlan(slots, num_tokens, num_computed, is_sampled, self._token_ids, blocks, 0, 0)
        before = self._executor.counters()
        elapsed_s = self._executor.execute(plan).elapsed_s
        return _work(before, self._executor.counters(), elapsed_s)


def rounds_within(measure: Callable[[], T], effort: Effort, clock: Clock, budget_s: float) -> list[T]:
    """Results of as many rounds as fit into the time, `min_rounds` at least."""
    end_s = clock() + budget_s
    results = [measure() for _ in range(effort.min_rounds)]
    while len(results) < effort.max_rounds and clock() < end_s:
        results.append(measure())
    return results


def median(values: list[float]) -> float:
    return float(np.median(values))


def _work(before: NativeCounters, after: NativeCounters, elapsed_s: float) -> Work:
    spent = {op: after.seconds_by_op[op] - before.seconds_by_op[op] for op in after.seconds_by_op}
    return Work(
        elapsed_s=elapsed_s,
        matmul_s=sum(spent[op] for op in _MATMUL_OPS),
        attention_s=spent["attention"],
        matmul_flop=after.matmul_flop - before.matmul_flop,
        attention_flop=after.attention_flop - before.attention_flop,
        weight_bytes=after.weight_bytes - before.weight_bytes,
        kv_bytes=after.kv_bytes - before.kv_bytes,
    )
