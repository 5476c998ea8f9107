"""The shapes of the two ends of an order, and how the paper splits KV memory and prefill between them (section 5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blendserve.costs.model_cost import partition_memory
from blendserve.planner.base import Int64s
from blendserve.planner.plan import Plan
from blendserve.planner.schedule import Schedule

MAX_DENSITY = 1e6
"""Stands for requests that decode nothing."""


@dataclass(frozen=True, slots=True)
class EndShape:
    """Means over the next requests of one end. Units: tokens; `own_tokens` are prompt tokens that are not shared."""

    density: float
    prompt_tokens: float
    own_tokens: float
    output_tokens: float

    def prefill_tokens(self, memory_tokens: float) -> float:
        """Prefill tokens per step that keep `memory_tokens` of KV filled: N p / d with N = M / (p + d / 2)."""
        num_seqs = memory_tokens / (self.prompt_tokens + self.output_tokens / 2)
        return num_seqs * self.own_tokens / max(self.output_tokens, 1.0)


def end_shape(plan: Plan, schedule: Schedule, requests: Int64s, capacity_tokens: int) -> EndShape:
    """Of the next requests in turn, those that fill the memory at their average size."""
    if not len(requests):
        return EndShape(schedule.root_density, 1.0, 1.0, 1.0)
    prompts, outputs = plan.table.num_prompt_tokens[requests], schedule.expected_output_tokens[requests]
    count = 1 + int(np.searchsorted(np.cumsum(prompts + outputs / 2), capacity_tokens))
    requests, prompts, outputs = requests[:count], prompts[:count], outputs[:count]
    compute_s, memory_s = schedule.compute_s[requests].sum(), schedule.memory_s[requests].sum()
    return EndShape(
        density=min(float(compute_s / memory_s), MAX_DENSITY) if memory_s > 0 else MAX_DENSITY,
        prompt_tokens=max(1.0, float(prompts.mean())),
        own_tokens=max(1.0, float((prompts - schedule.num_shared_tokens[requests]).mean())),
        output_tokens=float(outputs.mean()),
    )


class EndShare(NamedTuple):
    """What one end gets: M of the KV memory, and C prefill tokens per step."""

    memory_tokens: float
    prefill_tokens: float


class MemorySplit(NamedTuple):
    """Both ends' shares."""

    compute_end: EndShare
    memory_end: EndShare

    @property
    def num_prefill_tokens(self) -> float:
        """Prefill tokens per step of both ends."""
        return self.compute_end.prefill_tokens + self.memory_end.prefill_tokens


NO_SPLIT = MemorySplit(EndShare(0.0, 0.0), EndShare(0.0, 0.0))


def split_memory(compute_end: EndShape, memory_end: EndShape, density: float, capacity_tokens: int) -> MemorySplit:
    """Shares of the memory whose mix has the density of what is left of the job, and the prefill that fills them."""
    parts = partition_memory(compute_end.density, memory_end.density, density, capacity_tokens)
    shares = zip((compute_end, memory_end), parts, strict=True)
    return MemorySplit(*(EndShare(tokens, end.prefill_tokens(tokens)) for end, tokens in shares))
