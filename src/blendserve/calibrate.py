"""Measures this machine with the native engine's own steps on random weights: what is calibrated is what runs.

A round takes every probe of a phase once, so that what else the machine does disturbs all of them alike; medians of the
rounds are kept. The engine runs its ops one after the other today, so the delays stored are those of a sequential
engine; how well matrix products and decode attention share the machine is measured beside that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np

from blendserve.config import BLOCK_SIZE, EngineConfig, available_memory_bytes
from blendserve.cost import ModelCost
from blendserve.engine.step import Int32s, StepPlan
from blendserve.executors.native import Floats, NativeCounters, NativeExecutor
from blendserve.hardware import SEQUENTIAL, Calibration, machine_name
from blendserve.models.known import SMOLLM2_135M
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import expected_shapes

T = TypeVar("T")
Clock = Callable[[], float]

SHAPE = replace(SMOLLM2_135M, vocab_size=256)
"""The default model but for its head: the head is no part of what every token costs."""

_CONTEXT = 1024  # tokens that a decode reads: what the heads of one sequence share a core's cache with
_BESIDE_TOKENS = 128  # of the step that shares the machine: enough for the full rate of matrix products
_MIN_ROUNDS = 3
_MATMUL_OPS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. `num_layers` of weights and `kv_bytes` (plus a quarter per thread) have to exceed the
    caches; no step beyond `longest_step_s` is tried; each of three phases takes `phase_s` and at least three rounds."""

    num_layers: int
    token_counts: tuple[int, ...]
    longest_step_s: float
    phase_s: float
    max_rounds: int
    kv_bytes: int = 128 << 20


FULL = Effort(30, (1, 8, 32, 64, 128, 256, 512, 1024), longest_step_s=2.0, phase_s=12.0, max_rounds=9)
QUICK = Effort(12, (1, 16, 64, 256), longest_step_s=0.25, phase_s=0.8, max_rounds=5)


class Spread(NamedTuple):
    """The median of repeats, and the least and most of them."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(min(samples), float(np.median(samples)), max(samples))


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


class GemmPoint(NamedTuple):
    """Matrix products of a step of so many tokens; the step without attention as measured, and as the stored numbers
    have it."""

    num_tokens: int
    flop_per_s: Spread
    step_s: float
    modelled_s: float


class SideBySide(NamedTuple):
    """Rates on half of the threads, as shares of the rate on all: alone, and beside each other."""

    gemm_alone: Spread
    gemm_beside: Spread
    attention_alone: Spread
    attention_beside: Spread


@dataclass(frozen=True, slots=True)
class Measurements:
    """A calibration with the repeats behind it. `side_by_side` is None on one thread: there is no half of it."""

    calibration: Calibration
    gemm: tuple[GemmPoint, ...]
    kv_bytes_per_s_by_threads: tuple[tuple[int, Spread], ...]
    weight_bytes_per_s: Spread
    prefill_attention_flop_per_s: Spread
    constant_s: Spread
    side_by_side: SideBySide | None


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
    """A native executor with steps made by hand; sequence i owns the i-th run of KV blocks. Close it after use."""

    def __init__(self, spec: ModelSpec, *, num_threads: int, num_sequences: int, max_tokens: int, context: int) -> None:
        blocks_each = -(-context // BLOCK_SIZE)
        config = EngineConfig(
            max_num_seqs=num_sequences,
            max_num_batched_tokens=max(max_tokens, num_sequences),
            max_model_len=blocks_each * BLOCK_SIZE,
            num_threads=num_threads,
        )
        num_blocks = num_sequences * blocks_each
        self._executor = NativeExecutor(spec, SyntheticWeights(spec), config, num_blocks=num_blocks)
        self._token_ids = np.zeros((num_sequences, config.max_model_len), dtype=np.int32)
        self._block_tables = np.arange(num_blocks, dtype=np.int32).reshape(num_sequences, blocks_each)

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

    def close(self) -> None:
        self._executor.close()

    def _run(self, slots: Int32s, num_tokens: int, num_computed: int, blocks: Int32s) -> Work:
        def each(value: int) -> Int32s:
            return np.full(len(slots), value, dtype=np.int32)

        is_sampled = np.zeros(len(slots), dtype=np.bool_)
        plan = StepPlan(slots, each(num_tokens), each(num_computed), is_sampled, self._token_ids, blocks, 0, 0)
        before = self._executor.counters()
        elapsed_s = self._executor.execute(plan).elapsed_s
        return _work(before, self._executor.counters(), elapsed_s)


def calibrate(
    num_threads: int, effort: Effort = FULL, *, shape: ModelSpec = SHAPE, clock: Clock = time.perf_counter
) -> Measurements:
    """Measure this machine with so many threads. Nothing is stored: `Measurements.calibration.save` does that."""
    memory_bytes = available_memory_bytes()
    spec = replace(shape, num_layers=effort.num_layers)
    steps = _measure_steps(spec, num_threads, effort, clock)
    points, prefill = _measure_attention(spec, num_threads, effort, clock)
    side_by_side = _measure_side_by_side(spec, num_threads, effort, clock) if num_threads > 1 else None
    largest, smallest = steps[max(steps)], steps[min(steps)]
    weights = Spread.of([work.weight_bytes / work.matmul_s for work in smallest])
    constant = Spread.of([work.elapsed_s - work.matmul_s - work.attention_s for work in smallest])
    gemm = {count: Spread.of([work.matmul_flop_per_s for work in works]) for count, works in steps.items()}
    calibration = Calibration(
        machine=machine_name(),
        dtype="bf16",
        num_threads=num_threads,
        # With the norms, rotations and packing of a large step, which cost every token its share.
        gemm_flop_per_s=_median([work.matmul_flop / (work.elapsed_s - work.attention_s) for work in largest]),
        weight_bytes_per_s=weights.median,
        kv_bytes_per_s=points[num_threads].median,
        prefill_attention_flop_per_s=prefill.median,
        constant_s=constant.median,
        compute_delay=SEQUENTIAL.compute_delay,
        memory_delay=SEQUENTIAL.memory_delay,
        memory_bytes=float(memory_bytes),
        gemm_points=tuple((count, spread.median) for count, spread in gemm.items()),
        bandwidth_points=tuple((count, spread.median) for count, spread in points.items()),
        gemm_share=side_by_side.gemm_beside.median if side_by_side else 0.0,
        attention_share=side_by_side.attention_beside.median if side_by_side else 0.0,
    )
    cost = calibration.step_cost(ModelCost.from_spec(spec))
    step_s = {count: _median([work.elapsed_s - work.attention_s for work in works]) for count, works in steps.items()}
    return Measurements(
        calibration=calibration,
        gemm=tuple(GemmPoint(count, gemm[count], step_s[count], cost.compute_s(count)) for count in steps),
        kv_bytes_per_s_by_threads=tuple(points.items()),
        weight_bytes_per_s=weights,
        prefill_attention_flop_per_s=prefill,
        constant_s=constant,
        side_by_side=side_by_side,
    )


def _measure_steps(spec: ModelSpec, num_threads: int, effort: Effort, clock: Clock) -> dict[int, list[Work]]:
    """Steps of each number of tokens that is not too long for this machine."""
    with closing(_step_probe(spec, num_threads, max(effort.token_counts))) as probe:
        counts = _affordable(probe, effort)
        rounds = rounds_within(lambda: [probe.prefill(count) for count in counts], effort, clock, effort.phase_s)
    return {count: [works[i] for works in rounds] for i, count in enumerate(counts)}


def _affordable(probe: Probe, effort: Effort) -> list[int]:
    """Numbers of tokens up to the longest step allowed. Running them also touches every weight for the first time."""
    counts: list[int] = []
    for count in effort.token_counts:
        counts.append(count)
        if 2 * probe.prefill(count).elapsed_s > effort.longest_step_s:
            break
    return counts


def _measure_attention(
    spec: ModelSpec, num_threads: int, effort: Effort, clock: Clock
) -> tuple[dict[int, Spread], Spread]:
    """Rate at which decodes read KV by number of threads, and flop/s of prefill attention on all of them."""
    counts = thread_counts(num_threads)
    points: dict[int, Spread] = {}
    for count in counts:
        with closing(_attention_probe(spec, count, num_threads, effort)) as probe:
            measure = partial(_decode_and_prefill, probe)
            rounds = rounds_within(measure, effort, clock, effort.phase_s / len(counts))
        points[count] = Spread.of([decode.kv_bytes_per_s for decode, _ in rounds])
        prefill = Spread.of([work.attention_flop / work.attention_s for _, work in rounds])
    return points, prefill


def _decode_and_prefill(probe: Probe) -> tuple[Work, Work]:
    return probe.decode(), probe.prefill(_CONTEXT)


def _measure_side_by_side(spec: ModelSpec, num_threads: int, effort: Effort, clock: Clock) -> SideBySide:
    half = num_threads // 2
    num_tokens = min(_BESIDE_TOKENS, max(effort.token_counts))
    with (
        closing(_step_probe(spec, num_threads, num_tokens)) as gemm_all,
        closing(_step_probe(spec, half, num_tokens)) as gemm_half,
        closing(_attention_probe(spec, num_threads, num_threads, effort)) as attention_all,
        closing(_attention_probe(spec, half, num_threads, effort)) as attention_half,
    ):

        def measure() -> tuple[float, float, float, float]:
            gemm, attention = gemm_all.prefill(num_tokens).matmul_flop_per_s, attention_all.decode().kv_bytes_per_s
            gemm_alone = gemm_half.prefill(num_tokens).matmul_flop_per_s
            attention_alone = attention_half.decode().kv_bytes_per_s
            gemm_beside, attention_beside = _run_beside(gemm_half, num_tokens, attention_half)
            return gemm_alone / gemm, gemm_beside / gemm, attention_alone / attention, attention_beside / attention

        columns = zip(*rounds_within(measure, effort, clock, effort.phase_s), strict=True)
        return SideBySide(*(Spread.of(list(column)) for column in columns))


def _run_beside(gemm: Probe, num_tokens: int, attention: Probe) -> tuple[float, float]:
    """Flop/s of a step's matrix products and bytes/s of decode attention while both run; the core frees the GIL."""
    is_done = threading.Event()

    def attend() -> list[float]:
        rates = [attention.decode().kv_bytes_per_s]
        while not is_done.is_set():
            rates.append(attention.decode().kv_bytes_per_s)
        return rates

    with ThreadPoolExecutor(1) as pool:
        attending = pool.submit(attend)
        try:
            gemm_flop_per_s = gemm.prefill(num_tokens).matmul_flop_per_s
        finally:
            is_done.set()
        return gemm_flop_per_s, _median(attending.result())


def _step_probe(spec: ModelSpec, num_threads: int, max_tokens: int) -> Probe:
    return Probe(spec, num_threads=num_threads, num_sequences=1, max_tokens=max_tokens, context=max_tokens)


def _attention_probe(spec: ModelSpec, num_threads: int, most_threads: int, effort: Effort) -> Probe:
    """One layer with the heads of `spec` and next to no matrices, its KV memory in place."""
    small = replace(spec, num_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)
    num_bytes = min(effort.kv_bytes * (1 + most_threads / 4), available_memory_bytes() / 8)
    num_sequences = max(1, int(num_bytes / (small.kv_bytes_per_token() * _CONTEXT)))
    probe = Probe(small, num_threads=num_threads, num_sequences=num_sequences, max_tokens=_CONTEXT, context=_CONTEXT)
    probe.touch()
    return probe


def thread_counts(num_threads: int) -> list[int]:
    """Powers of two below the number of threads, and that number."""
    return [1 << i for i in range(num_threads.bit_length()) if 1 << i < num_threads] + [num_threads]


def rounds_within(measure: Callable[[], T], effort: Effort, clock: Clock, budget_s: float) -> list[T]:
    """Results of as many rounds as fit into the time, three at least."""
    end_s = clock() + budget_s
    results = [measure() for _ in range(_MIN_ROUNDS)]
    while len(results) < effort.max_rounds and clock() < end_s:
        results.append(measure())
    return results


def _median(values: list[float]) -> float:
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
