"""The paper's dual scanner (Algorithm 3) with its budgets, kept as the baseline to beat.

KV memory is split between the ends so that their mix has the density of what is left of the job; each end admits as
many requests as fit its part at their average size, and contributes N p / d prefill tokens per step. Online adaptation
(section 5.4): an early end frees its account, a runaway moves to the memory end's.

Readings of what the paper leaves open. Sampled requests run before all others, and ends are weighed once half of them
have finished, and again once all have. Sharing counts in an end's density and in its p, since a hit is not computed. An
end's density, p and d are means over the next requests there whose average KV fills the memory. The split follows the
scan: it is made anew every `CHECK_STEPS` steps. Requests still in prefill are what the step's budget pays for; decoding
they count for the memory of their end. As in NanoFlow's engine, below the paper's, whoever would raise the forecast
peak of the memory end beyond its part waits: average sizes alone let all long requests start together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import Floats, partition_memory
from blendserve.planner.base import Int64s, SchedulerView
from blendserve.planner.forecast import KvForecast
from blendserve.planner.plan import Plan
from blendserve.planner.scanner import NO_REQUEST, DualScanner

MAX_WINDOW = 256
RUNAWAY_RATIO = 2.0
"""A request of the compute end that has run for this many times its estimate belongs to the memory end."""
CHECK_STEPS = 16
QUANTA = 16
"""Steps are filled up to multiples of this part of the largest batch: 128 tokens of 2048."""
SAMPLE_SHARE = 0.5
"""Share of the sampled requests that must have finished before others enter."""
_MAX_DENSITY = 1e6  # stands for requests that decode nothing


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


class PaperPolicy:
    """Algorithm 3; see the module."""

    name = "paper"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._schedule = plan.schedule
        self._lengths = plan.new_lengths()
        self._unfinished_samples = set(self._lengths.samples.tolist())
        self._num_awaited = int(len(self._unfinished_samples) * SAMPLE_SHARE)
        self._scanner = DualScanner(plan.schedule.order, self._lengths.samples)
        self._is_at_memory_end = np.zeros(plan.num_requests, dtype=np.bool_)
        self._memory_tokens = (0.0, 0.0)
        self._budgets = (0.0, 0.0)
        self._used = self._pending = 0.0
        self._num_decodes = 0
        self._proposed_at_memory_end = False
        self._forecast = KvForecast()
        self._waiting_compute_s = self._waiting_memory_s = 0.0
        self._is_new_step = self._is_stale = True
        self._step = 0
        self._weigh_waiting()

    @property
    def num_waiting(self) -> int:
        return self._scanner.num_waiting

    @property
    def _is_sampling(self) -> bool:
        """Are the estimates still those from before the sampled requests?"""
        return len(self._unfinished_samples) > self._num_awaited

    def next(self, view: SchedulerView) -> int | None:
        scanner = self._scanner
        if not scanner.num_waiting or len(view.request_index) >= view.max_num_seqs:
            return None
        first = scanner.peek_first()
        if first != NO_REQUEST or not len(view.request_index):
            return self._propose(first if first != NO_REQUEST else scanner.peek_compute_end(), at_memory_end=False)
        if self._is_sampling:
            return None
        if self._is_new_step:
            self._begin_step(view)
        if self._pending < self._budgets[False] and self._used <= self._memory_tokens[False]:
            return self._propose(scanner.peek_compute_end(), at_memory_end=False)
        request = scanner.peek_memory_end()
        if self._fits_memory_end(request):
            return self._propose(request, at_memory_end=True)
        return None

    def prefill_tokens(self, view: SchedulerView) -> int:
        if self._is_new_step:
            self._begin_step(view)
        self._step += 1
        self._is_new_step = True
        self._is_stale |= self._step % CHECK_STEPS == 0
        if self._is_sampling:
            return view.max_num_batched_tokens
        quantum = max(1, view.max_num_batched_tokens // QUANTA)
        num_decodes = self._num_decodes
        return math.ceil((num_decodes + sum(self._budgets)) / quantum) * quantum - num_decodes

    def admitted(self, index: int, num_cached_tokens: int) -> None:
        self._scanner.take(index)
        self._waiting_compute_s -= float(self._schedule.compute_s[index])
        self._waiting_memory_s -= float(self._schedule.memory_s[index])
        self._is_at_memory_end[index] = self._proposed_at_memory_end
        num_prompt_tokens = int(self._plan.table.num_prompt_tokens[index])
        if self._proposed_at_memory_end:
            self._forecast.add(self._step, float(num_prompt_tokens), self._outset(index))
        else:
            self._pending += num_prompt_tokens - num_cached_tokens

    def finished(self, index: int, num_output_tokens: int) -> None:
        self._is_stale |= bool(self._is_at_memory_end[index])
        self._lengths.observe(index, num_output_tokens)
        if index in self._unfinished_samples:
            self._unfinished_samples.discard(index)
            if len(self._unfinished_samples) in (0, self._num_awaited):
                self._plan_with_samples()

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._waiting_compute_s += float(self._schedule.compute_s[index])
        self._waiting_memory_s += float(self._schedule.memory_s[index])
        self._scanner.put_back(index, at_memory_end=bool(self._is_at_memory_end[index]))
        self._is_stale = True

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0

    def _propose(self, request: int, *, at_memory_end: bool) -> int:
        self._proposed_at_memory_end = at_memory_end
        return request

    def _outset(self, request: int) -> Floats:
        expected: Floats = np.maximum(self._schedule.expected_output_tokens[request : request + 1], 1.0)
        return expected

    def _fits_memory_end(self, request: int) -> bool:
        kv_tokens = float(self._plan.table.num_prompt_tokens[request])
        limit = self._memory_tokens[True]
        return self._forecast.fits(request, self._step, kv_tokens, self._outset(request), limit)

    def _begin_step(self, view: SchedulerView) -> None:
        """What the compute end holds: p + d / 2 tokens for each request that decodes, and prefill still to do."""
        self._is_new_step = False
        running = view.request_index
        if self._is_stale:
            self._split_memory(view)
        left = np.maximum(view.num_prompt_tokens + view.num_output_tokens - 1 - view.num_computed_tokens, 0)
        is_at_compute_end = ~self._is_at_memory_end[running]
        average = view.num_prompt_tokens + self._schedule.expected_output_tokens[running] / 2
        self._num_decodes = int(np.count_nonzero(left == 0))
        self._pending = float(left[is_at_compute_end].sum())
        self._used = float(average[is_at_compute_end & (left == 0)].sum())

    def _split_memory(self, view: SchedulerView) -> None:
        """M_L, M_R and C_L, C_R from the shapes of the two ends now, and the peak that the memory end heads for."""
        self._is_stale = False
        self._move_runaways(view)
        capacity = view.capacity_tokens
        compute_end = self._shape(self._scanner.upcoming(MAX_WINDOW), capacity)
        memory_end = self._shape(self._scanner.upcoming_memory_end(MAX_WINDOW)[::-1], capacity)
        parts = partition_memory(compute_end.density, memory_end.density, self._density_left(view), capacity)
        self._memory_tokens = parts
        self._budgets = (compute_end.prefill_tokens(parts[0]), memory_end.prefill_tokens(parts[1]))
        rows = self._is_at_memory_end[view.request_index]
        held = (view.num_prompt_tokens + view.num_output_tokens)[rows]
        remaining = self._lengths.remaining(view.request_index[rows], view.num_output_tokens[rows])
        self._forecast.rebuild(self._step, held.astype(np.float64), remaining[:, None])

    def _density_left(self, view: SchedulerView) -> float:
        """Density of the requests that wait and of what running ones have still to do."""
        lengths, cost = self._lengths, self._plan.cost
        first, squared = lengths.moments(view.request_index, view.num_output_tokens)
        held = view.num_prompt_tokens + view.num_output_tokens
        prefill = np.maximum(held - 1 - view.num_computed_tokens, 0)
        compute_s = self._waiting_compute_s + cost.decode_s * float(first.sum()) + cost.token_s * float(prefill.sum())
        memory_s = self._waiting_memory_s + cost.kv_token_s * float((held * first + squared / 2).sum())
        return min(max(compute_s, 0.0) / max(memory_s, 1e-12), _MAX_DENSITY)

    def _shape(self, requests: Int64s, capacity_tokens: int) -> EndShape:
        """Of the next requests in turn, those that fill the memory at their average size."""
        schedule = self._schedule
        if not len(requests):
            return EndShape(schedule.root_density, 1.0, 1.0, 1.0)
        prompts, outputs = self._plan.table.num_prompt_tokens[requests], schedule.expected_output_tokens[requests]
        count = 1 + int(np.searchsorted(np.cumsum(prompts + outputs / 2), capacity_tokens))
        requests, prompts, outputs = requests[:count], prompts[:count], outputs[:count]
        compute_s, memory_s = schedule.compute_s[requests].sum(), schedule.memory_s[requests].sum()
        return EndShape(
            density=min(float(compute_s / memory_s), _MAX_DENSITY) if memory_s > 0 else _MAX_DENSITY,
            prompt_tokens=max(1.0, float(prompts.mean())),
            own_tokens=max(1.0, float((prompts - schedule.num_shared_tokens[requests]).mean())),
            output_tokens=float(outputs.mean()),
        )

    def _move_runaways(self, view: SchedulerView) -> None:
        expected = self._schedule.expected_output_tokens[view.request_index]
        is_runaway = view.num_output_tokens > RUNAWAY_RATIO * np.maximum(expected, 1.0)
        self._is_at_memory_end[view.request_index[is_runaway]] = True

    def _plan_with_samples(self) -> None:
        """Sampled lengths are known: order what waits by them."""
        self._lengths.refresh()
        self._schedule = self._plan.reschedule(self._lengths)
        self._scanner.reorder(self._schedule.order)
        self._weigh_waiting()
        self._is_stale = True

    def _weigh_waiting(self) -> None:
        waiting = self._scanner.waiting()
        self._waiting_compute_s = float(self._schedule.compute_s[waiting].sum())
        self._waiting_memory_s = float(self._schedule.memory_s[waiting].sum())
