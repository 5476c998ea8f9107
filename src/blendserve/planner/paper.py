"""The paper's dual scanner (Algorithm 3) with its static budgets, kept as the baseline to beat.

KV memory is split between the ends so that their mix has the root's density; each end admits as many requests as fit
its part at their average size, and contributes a fixed number of prefill tokens per step. Online adaptation (section
5.4): an early end frees its account, a runaway moves to the memory end's.

Readings of what the paper leaves open: an end's density, p and d are means over the next `WINDOW` requests there;
sharing counts in the compute end's density; requests sampled for their lengths enter before all others.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from blendserve.cost import partition_memory
from blendserve.planner.base import Int64s, SchedulerView
from blendserve.planner.plan import Plan
from blendserve.planner.scanner import NO_REQUEST, DualScanner

WINDOW = 64
RUNAWAY_RATIO = 2.0
"""A request of the compute end that has run for this many times its estimate belongs to the memory end."""
CHECK_STEPS = 16
_MAX_DENSITY = 1e6  # stands for requests that decode nothing


@dataclass(frozen=True, slots=True)
class EndShape:
    """Means over the next requests of one end. Units: tokens."""

    density: float
    prompt_tokens: float
    output_tokens: float

    def prefill_tokens(self, memory_tokens: float) -> float:
        """Prefill tokens per step that keep `memory_tokens` of KV filled: N p / d with N = M / (p + d / 2)."""
        num_seqs = memory_tokens / (self.prompt_tokens + self.output_tokens / 2)
        return num_seqs * self.prompt_tokens / max(self.output_tokens, 1.0)


class PaperPolicy:
    """Algorithm 3; see the module."""

    name = "paper"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._schedule = plan.schedule
        self._lengths = plan.new_lengths()
        self._unfinished_samples = set(self._lengths.samples.tolist())
        self._scanner = DualScanner(plan.schedule.order, self._lengths.samples)
        self._charge_by_request: tuple[dict[int, float], dict[int, float]] = ({}, {})
        self._used = [0.0, 0.0]
        self._memory_tokens = (0.0, 0.0)
        self._prefill_tokens = 0
        self._proposed_at_memory_end = False
        self._num_admitted_since_split = WINDOW
        self._step = 0

    @property
    def num_waiting(self) -> int:
        return self._scanner.num_waiting

    def next(self, view: SchedulerView) -> int | None:
        scanner = self._scanner
        if not scanner.num_waiting or len(view.request_index) >= view.max_num_seqs:
            return None
        if self._num_admitted_since_split >= WINDOW:
            self._split_memory(view.capacity_tokens)
        ends = (self._peek_compute_end(), scanner.peek_memory_end())
        if not len(view.request_index):
            return self._propose(ends[0], at_memory_end=False)
        for at_memory_end in (False, True):
            charge = self._average_tokens(ends[at_memory_end])
            if self._used[at_memory_end] + charge <= self._memory_tokens[at_memory_end]:
                return self._propose(ends[at_memory_end], at_memory_end=at_memory_end)
        return None

    def prefill_tokens(self, view: SchedulerView) -> int:
        self._step += 1
        if self._step % CHECK_STEPS == 0:
            self._move_runaways(view)
        return self._prefill_tokens

    def admitted(self, index: int, num_cached_tokens: int) -> None:  # noqa: ARG002
        self._scanner.take(index)
        self._num_admitted_since_split += 1
        self._charge(index, self._average_tokens(index), at_memory_end=self._proposed_at_memory_end)

    def finished(self, index: int, num_output_tokens: int) -> None:
        self._discharge(index)
        self._lengths.observe(index, num_output_tokens)
        if index in self._unfinished_samples:
            self._unfinished_samples.discard(index)
            if not self._unfinished_samples:
                self._plan_with_samples()

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._scanner.put_back(index, at_memory_end=self._discharge(index))

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0

    def _peek_compute_end(self) -> int:
        first = self._scanner.peek_first()
        return first if first != NO_REQUEST else self._scanner.peek_compute_end()

    def _propose(self, request: int, *, at_memory_end: bool) -> int:
        self._proposed_at_memory_end = at_memory_end
        return request

    def _average_tokens(self, request: int) -> float:
        """KV tokens that a request holds on average: p + d / 2."""
        expected = float(self._schedule.expected_output_tokens[request])
        return float(self._plan.table.num_prompt_tokens[request]) + expected / 2

    def _charge(self, request: int, tokens: float, *, at_memory_end: bool) -> None:
        self._charge_by_request[at_memory_end][request] = tokens
        self._used[at_memory_end] += tokens

    def _discharge(self, request: int) -> bool:
        """Take a request off its account; tells whether that was the memory end's."""
        at_memory_end = request in self._charge_by_request[True]
        self._used[at_memory_end] -= self._charge_by_request[at_memory_end].pop(request)
        return at_memory_end

    def _split_memory(self, capacity_tokens: int) -> None:
        """M_L, M_R and C_L, C_R from the shapes of the two ends now."""
        self._num_admitted_since_split = 0
        compute_end = self._shape(self._scanner.upcoming(WINDOW))
        memory_end = self._shape(self._scanner.upcoming_memory_end(WINDOW))
        self._memory_tokens = partition_memory(
            compute_end.density, memory_end.density, self._schedule.root_density, capacity_tokens
        )
        tokens = compute_end.prefill_tokens(self._memory_tokens[0]) + memory_end.prefill_tokens(self._memory_tokens[1])
        self._prefill_tokens = max(1, int(tokens))

    def _shape(self, requests: Int64s) -> EndShape:
        schedule = self._schedule
        if not len(requests):
            return EndShape(schedule.root_density, 1.0, 1.0)
        compute_s, memory_s = schedule.compute_s[requests].sum(), schedule.memory_s[requests].sum()
        return EndShape(
            density=min(float(compute_s / memory_s), _MAX_DENSITY) if memory_s > 0 else _MAX_DENSITY,
            prompt_tokens=max(1.0, float(self._plan.table.num_prompt_tokens[requests].mean())),
            output_tokens=float(schedule.expected_output_tokens[requests].mean()),
        )

    def _move_runaways(self, view: SchedulerView) -> None:
        expected = self._schedule.expected_output_tokens[view.request_index]
        is_runaway = view.num_output_tokens > RUNAWAY_RATIO * np.maximum(expected, 1.0)
        for row in np.flatnonzero(is_runaway).tolist():
            request = int(view.request_index[row])
            if request in self._charge_by_request[False]:
                self._discharge(request)
                tokens = float(view.num_prompt_tokens[row] + view.num_output_tokens[row])
                self._charge(request, tokens, at_memory_end=True)

    def _plan_with_samples(self) -> None:
        """All sampled lengths are known: order what waits by them."""
        self._lengths.refresh()
        self._schedule = self._plan.reschedule(self._lengths)
        self._scanner.reorder(self._schedule.order)
        self._num_admitted_since_split = WINDOW
