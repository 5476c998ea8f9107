"""Measures what running a step as two nano-batches saves on this machine, for a few settings of how they overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from blendserve.calibration.step_probe import Clock, Effort, Probe, Work, median, rounds_within
from blendserve.config import Dtype, KvDtype
from blendserve.costs.step_cost import SEQUENTIAL, Interference, OverlapCost
from blendserve.host import available_memory_bytes
from blendserve.models.spec import ModelSpec

_OVERLAP_KV_SHARES = 12  # of an effort's kv_bytes: KV of all layers, not of one
_MOST_OVERLAP_SEQUENCES = 64  # decodes of so many tokens: about as much memory as compute for grouped-query models
_PROMPT_SHARES = (0, 1, 3)  # prompt tokens beside each decode
_LEAST_OVERLAP_GAIN = 0.01
_DELAYS = np.linspace(0.0, 1.0, 101)
# Lanes wait for the rest of a fetch now and then: where 23 of 96 threads saturate, 32 are best (bench/memory_lanes.py).
_LANES_PER_SATURATING_THREAD = 4 / 3
CONTEXT = 1024


class OverlapTrial(NamedTuple):
    """One setting tried on steps of one mix: off and on in turn."""

    num_decodes: int
    num_prompt_tokens: int
    cost: OverlapCost
    off: tuple[Work, ...]
    on: tuple[Work, ...]

    @property
    def off_s(self) -> float:
        return median([work.elapsed_s for work in self.off])

    @property
    def on_s(self) -> float:
        return median([work.elapsed_s for work in self.on])

    @property
    def memory_s(self) -> float:
        """Attention of the steps without overlap; the rest of them is compute."""
        return median([work.attention_s for work in self.off])


def measure_overlap(
    spec: ModelSpec,
    num_threads: int,
    effort: Effort,
    clock: Clock,
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "bf16",
    end_s: float = math.inf,
    num_lanes: int = 0,
) -> tuple[OverlapTrial, ...]:
    """Steps of decodes alone, and with tokens of a prompt beside them: as many as decodes, and three times as many, so
    that both attention and matrix products are once the longer part. Off and on in turn, for each setting; for no
    further one after `end_s` of the clock. `num_lanes`: memory lanes to try besides, 0 for none."""
    spec = replace(spec, num_layers=min(spec.num_layers, effort.num_overlap_layers))
    num_bytes = min(_OVERLAP_KV_SHARES * effort.kv_bytes, available_memory_bytes() / 8)
    count = max(2, min(_MOST_OVERLAP_SEQUENCES, int(num_bytes / (spec.kv_bytes_per_token(kv_dtype) * CONTEXT))))
    costs = _overlap_settings(num_lanes)[: effort.max_overlap_settings]
    trials: list[OverlapTrial] = []
    probe = Probe(
        spec,
        num_threads=num_threads,
        num_sequences=count,
        max_tokens=(1 + max(_PROMPT_SHARES)) * count,
        context=CONTEXT,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    with closing(probe) as p:
        p.touch()
        for cost in costs:
            if trials and clock() > end_s:
                break
            for num_prompt_tokens in [share * count for share in _PROMPT_SHARES]:
                measure = partial(_off_and_on, p, num_prompt_tokens, cost)
                pairs = rounds_within(measure, effort, clock, effort.phase_s / (len(_PROMPT_SHARES) * len(costs)))
                trials.append(OverlapTrial(count, num_prompt_tokens, cost, *zip(*pairs, strict=True)))
    return tuple(trials)


def lanes_to_try(bandwidth_by_threads: Mapping[int, float], num_threads: int) -> int:
    """Threads that may read KV beside matrix products, where so few saturate the memory that more would only wait; 0
    where none would, or one thread's bandwidth is not known."""
    if 1 not in bandwidth_by_threads:
        return 0
    num_saturating = bandwidth_by_threads[num_threads] / bandwidth_by_threads[1]
    num_lanes = math.ceil(_LANES_PER_SATURATING_THREAD * num_saturating)
    return num_lanes if num_lanes < num_threads else 0


def _overlap_settings(num_lanes: int) -> list[OverlapCost]:
    default = OverlapCost()
    slow = replace(default, iteration_bytes=48, chunk_bytes=384 << 10, tile_flop=5_000_000)
    with_lanes = [replace(default, memory_lanes=num_lanes)] if num_lanes else []
    return [default, *with_lanes, slow, replace(slow, iteration_bytes=128)]


def _off_and_on(probe: Probe, num_prompt_tokens: int, cost: OverlapCost) -> tuple[Work, Work]:
    probe.set_overlap("off", cost)
    off = probe.mixed(num_prompt_tokens)
    probe.set_overlap("on", cost)
    return off, probe.mixed(num_prompt_tokens)


def best_overlap(trials: Sequence[OverlapTrial], weights_s: float) -> OverlapCost:
    """The setting of the least time over all mixes, with its interference: the delays that explain its steps best, what
    reading the weights twice costs apart. SEQUENTIAL where no mix gains. `weights_s`: reading them once."""
    by_cost: dict[OverlapCost, list[OverlapTrial]] = {}
    for trial in trials:
        by_cost.setdefault(trial.cost, []).append(trial)
    cost, of_cost = min(by_cost.items(), key=lambda item: sum(trial.on_s / trial.off_s for trial in item[1]))
    if all(trial.on_s > (1 - _LEAST_OVERLAP_GAIN) * trial.off_s for trial in of_cost):
        return replace(cost, interference=SEQUENTIAL)
    return replace(cost, interference=_explained_by(of_cost, weights_s))


def _explained_by(trials: Sequence[OverlapTrial], weights_s: float) -> Interference:
    """The delays of the least squared error, as shares of the steps' times; the greatest of those that are equal."""
    compute_delay, memory_delay = np.meshgrid(_DELAYS, _DELAYS, indexing="ij")
    error = np.zeros_like(compute_delay)
    for trial in trials:
        compute_s, memory_s = trial.off_s - trial.memory_s, trial.memory_s
        again_s = 2 * max(compute_s / 2, weights_s) - max(compute_s, weights_s)
        step_s = np.maximum(compute_s + compute_delay * memory_s, memory_s + memory_delay * compute_s) + again_s
        error += (step_s / trial.on_s - 1) ** 2
    best = np.isclose(error, error.min(), rtol=0.0, atol=1e-9)
    place = np.unravel_index(np.argmax(np.where(best, compute_delay + memory_delay, -1.0)), error.shape)
    return Interference(float(compute_delay[place]), float(memory_delay[place]))
