"""Measures this machine with the native engine's own steps on random weights: what is calibrated is what runs.

A round takes every probe of a phase once, so that what else the machine does disturbs all of them alike; medians of the
rounds are kept. Rates are those of ops that run one after the other; what running them side by side in each core saves
is measured too (calibrate_overlap), and how well separate cores share the machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from blendserve.calibration.loop_probe import measure_loop_s
from blendserve.calibration.overlap_trials import CONTEXT, OverlapTrial, best_overlap, lanes_to_try, measure_overlap
from blendserve.calibration.step_probe import Clock, Effort, Probe, Work, median, rounds_within
from blendserve.config import BYTES_PER_WEIGHT, Dtype, KvDtype
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.stored_calibration import Calibration, machine_name
from blendserve.host import available_memory_bytes
from blendserve.models.known import SMOLLM2_135M
from blendserve.models.spec import ModelSpec

SHAPE = replace(SMOLLM2_135M, vocab_size=256)
"""The default model but for its head: the head is no part of what every token costs."""

_BESIDE_TOKENS = 128  # of the step that shares the machine: enough for the full rate of matrix products
_SHARE_BEFORE_LAST_TRIAL = 0.7  # of an effort's time: trials of one setting take a fifth of it
FULL = Effort(30, (1, 8, 32, 64, 128, 256, 512, 1024), longest_step_s=2.0, phase_s=12.0, max_rounds=9)
QUICK = Effort(12, (1, 16, 64, 256), longest_step_s=0.25, phase_s=0.8, max_rounds=5, name="quick")
FIRST_RUN = Effort(
    12,
    (1, 8, 32, 64, 256),
    longest_step_s=0.1,
    phase_s=0.3,
    max_rounds=5,
    name="first-run",
    has_all_trials=False,
    max_overlap_settings=2,
    num_overlap_layers=6,
    total_s=3.0,
)


class Spread(NamedTuple):
    """The median of repeats, and the least and most of them."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(min(samples), float(np.median(samples)), max(samples))


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
    """A calibration with the repeats behind it. `side_by_side` is None on one thread, where there is no half of it, and
    where the effort leaves it out, as `overlap` is empty then."""

    calibration: Calibration
    gemm: tuple[GemmPoint, ...]
    kv_bytes_per_s_by_threads: tuple[tuple[int, Spread], ...]
    weight_bytes_per_s: Spread
    prefill_attention_flop_per_s: Spread
    layer_constant_s: Spread
    loop_s: float
    side_by_side: SideBySide | None
    overlap: tuple[OverlapTrial, ...]


def calibrate(
    num_threads: int,
    effort: Effort = FULL,
    *,
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "bf16",
    shape: ModelSpec = SHAPE,
    clock: Clock = time.perf_counter,
) -> Measurements:
    """Measure this machine with so many threads, weights of `dtype` and KV of `kv_dtype`. Nothing is stored:
    `Measurements.calibration.save` does that."""
    began_s = clock()
    memory_bytes = available_memory_bytes()
    spec = replace(shape, num_layers=effort.num_layers)
    steps = _measure_steps(spec, num_threads, dtype, kv_dtype, effort, clock)
    points, prefill = _measure_attention(spec, num_threads, kv_dtype, effort, clock)
    is_divisible = num_threads > 1 and effort.has_all_trials
    side_by_side = _measure_side_by_side(spec, num_threads, dtype, kv_dtype, effort, clock) if is_divisible else None
    has_time = clock() - began_s < effort.total_s / 2
    end_s = began_s + _SHARE_BEFORE_LAST_TRIAL * effort.total_s
    lanes = lanes_to_try({count: spread.median for count, spread in points.items()}, num_threads)
    trials = measure_overlap(spec, num_threads, effort, clock, dtype, kv_dtype, end_s, lanes) if has_time else ()
    loop_s = measure_loop_s(spec, num_threads, dtype, clock)
    found = _StepTimes.of(steps, spec.num_layers)
    # Without a trial no step is overlapped: that it pays has to be measured.
    cost = (
        best_overlap(trials, trials[0].off[0].weight_bytes / found.weight_bytes_per_s.median)
        if trials
        else OverlapCost()
    )
    calibration = Calibration(
        machine=machine_name(),
        dtype=dtype,
        num_threads=num_threads,
        # With the norms, rotations and packing of a large step, which cost every token its share.
        gemm_flop_per_s=found.step_flop_per_s[max(steps)],
        weight_bytes_per_s=found.weight_bytes_per_s.median,
        kv_bytes_per_s=points[num_threads].median,
        prefill_attention_flop_per_s=prefill.median,
        layer_constant_s=found.layer_constant_s.median,
        loop_s=loop_s,
        compute_delay=cost.interference.compute_delay,
        memory_delay=cost.interference.memory_delay,
        memory_bytes=float(memory_bytes),
        gemm_points=tuple((count, spread.median) for count, spread in found.gemm_flop_per_s.items()),
        step_points=tuple(found.step_flop_per_s.items()),
        bandwidth_points=tuple((count, spread.median) for count, spread in points.items()),
        gemm_share=side_by_side.gemm_beside.median if side_by_side else 0.0,
        attention_share=side_by_side.attention_beside.median if side_by_side else 0.0,
        chunk_bytes=cost.chunk_bytes,
        tile_flop=cost.tile_flop,
        iteration_bytes=cost.iteration_bytes,
        memory_lanes=cost.memory_lanes,
        kv_dtype=kv_dtype,
        effort=effort.name,
    )
    cost_model = calibration.step_cost(
        ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[dtype], kv_dtype=kv_dtype)
    )
    return Measurements(
        calibration=calibration,
        gemm=tuple(
            GemmPoint(count, rate, found.own_s[count], cost_model.compute_s(count) - loop_s)
            for count, rate in found.gemm_flop_per_s.items()
        ),
        kv_bytes_per_s_by_threads=tuple(points.items()),
        weight_bytes_per_s=found.weight_bytes_per_s,
        prefill_attention_flop_per_s=prefill,
        layer_constant_s=found.layer_constant_s,
        loop_s=loop_s,
        side_by_side=side_by_side,
        overlap=trials,
    )


class _StepTimes(NamedTuple):
    """What steps without decodes say, most of it by their number of tokens. `own_s` is a step without what attention
    reads; `step_flop_per_s` the rate of matrix products over all of that but the constants.
    """

    weight_bytes_per_s: Spread
    layer_constant_s: Spread
    gemm_flop_per_s: dict[int, Spread]
    step_flop_per_s: dict[int, float]
    own_s: dict[int, float]

    @classmethod
    def of(cls, steps: Mapping[int, Sequence[Work]], num_layers: int) -> _StepTimes:
        """The smallest step tells the constants, the start of attention among them."""
        smallest = steps[min(steps)]
        start_s = median([work.attention_s for work in smallest])
        constant = Spread.of([(work.elapsed_s - work.matmul_s) / num_layers for work in smallest])
        constant_s = constant.median * num_layers

        def own_s(work: Work) -> float:
            return work.elapsed_s - work.attention_s + start_s

        def flop_per_s(work: Work) -> float:
            return work.matmul_flop / max(own_s(work) - constant_s, work.matmul_s)

        return cls(
            weight_bytes_per_s=Spread.of([work.weight_bytes / work.matmul_s for work in smallest]),
            layer_constant_s=constant,
            gemm_flop_per_s={
                count: Spread.of([work.matmul_flop_per_s for work in works]) for count, works in steps.items()
            },
            step_flop_per_s={count: median([flop_per_s(work) for work in works]) for count, works in steps.items()},
            own_s={count: median([own_s(work) for work in works]) for count, works in steps.items()},
        )


def _measure_steps(
    spec: ModelSpec, num_threads: int, dtype: Dtype, kv_dtype: KvDtype, effort: Effort, clock: Clock
) -> dict[int, list[Work]]:
    """Steps of each number of tokens that is not too long for this machine."""
    with closing(_step_probe(spec, num_threads, dtype, kv_dtype, max(effort.token_counts))) as probe:
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
    spec: ModelSpec, num_threads: int, kv_dtype: KvDtype, effort: Effort, clock: Clock
) -> tuple[dict[int, Spread], Spread]:
    """Rate at which decodes read KV by number of threads, and flop/s of prefill attention on all of them."""
    counts = thread_counts(num_threads) if effort.has_all_trials else [num_threads]
    points: dict[int, Spread] = {}
    for count in counts:
        with closing(_attention_probe(spec, count, num_threads, kv_dtype, effort)) as probe:
            measure = partial(_decode_and_prefill, probe)
            rounds = rounds_within(measure, effort, clock, effort.phase_s / len(counts))
        points[count] = Spread.of([decode.kv_bytes_per_s for decode, _ in rounds])
        prefill = Spread.of([work.attention_flop / work.attention_s for _, work in rounds])
    return points, prefill


def _decode_and_prefill(probe: Probe) -> tuple[Work, Work]:
    return probe.decode(), probe.prefill(CONTEXT)


def _measure_side_by_side(
    spec: ModelSpec, num_threads: int, dtype: Dtype, kv_dtype: KvDtype, effort: Effort, clock: Clock
) -> SideBySide:
    half = num_threads // 2
    num_tokens = min(_BESIDE_TOKENS, max(effort.token_counts))
    with (
        closing(_step_probe(spec, num_threads, dtype, kv_dtype, num_tokens)) as gemm_all,
        closing(_step_probe(spec, half, dtype, kv_dtype, num_tokens)) as gemm_half,
        closing(_attention_probe(spec, num_threads, num_threads, kv_dtype, effort)) as attention_all,
        closing(_attention_probe(spec, half, num_threads, kv_dtype, effort)) as attention_half,
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
        return gemm_flop_per_s, median(attending.result())


def _step_probe(spec: ModelSpec, num_threads: int, dtype: Dtype, kv_dtype: KvDtype, max_tokens: int) -> Probe:
    return Probe(
        spec,
        num_threads=num_threads,
        num_sequences=1,
        max_tokens=max_tokens,
        context=max_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )


def _attention_probe(spec: ModelSpec, num_threads: int, most_threads: int, kv_dtype: KvDtype, effort: Effort) -> Probe:
    """One layer with the heads of `spec` and next to no matrices, its KV memory in place."""
    small = replace(spec, num_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)
    num_bytes = min(effort.kv_bytes * (1 + most_threads / 4), available_memory_bytes() / 8)
    num_sequences = max(1, int(num_bytes / (small.kv_bytes_per_token(kv_dtype) * CONTEXT)))
    probe = Probe(
        small,
        num_threads=num_threads,
        num_sequences=num_sequences,
        max_tokens=CONTEXT,
        context=CONTEXT,
        kv_dtype=kv_dtype,
    )
    probe.touch()
    return probe


def thread_counts(num_threads: int) -> list[int]:
    """Powers of two below the number of threads, and that number."""
    return [1 << i for i in range(num_threads.bit_length()) if 1 << i < num_threads] + [num_threads]
