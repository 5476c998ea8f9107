"""The default policy: both resources in the proportion in which they remain, and a KV memory that stays full.

Four rules (docs/paper-map.md, beyond the paper). `pace`: every step gets an even share of the compute that remains,
over the fewest steps that the rest of the job can take. `memory_gate`: the memory end enters as the forecast of its
peak allows, longest first because that is how densities fall. The compute end enters as prefill is wanted. `learner`:
what finishes corrects the estimates.

On an engine that does not overlap the two, their mix does not matter. Steps are filled up there, unless something that
runs is longer than all that waits, so that there will be steps anyway.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from blendserve.planner.base import Int64s, Proposal, SchedulerView, StepBudget
from blendserve.planner.horizon import Horizon
from blendserve.planner.learner import Learner
from blendserve.planner.memory_gate import MemoryGate
from blendserve.planner.pace import RestOfJob, RunningLoad, prefill_budget
from blendserve.planner.plan import Plan
from blendserve.planner.remaining import Remaining
from blendserve.planner.reserve import compute_end_reserve
from blendserve.planner.scanner import NO_REQUEST, DualScanner
from blendserve.planner.tree import BLOCK_KEY_BITS


@dataclass(frozen=True, slots=True)
class BlendSettings:
    """`kv_share`: share of the KV memory that forecasts may fill; more loses to preemption, less leaves steps empty.
    `max_reserve`: most of it that is held for the compute end. `refresh_steps`: steps between two forecasts from
    scratch. `num_upcoming`: requests at the compute end whose shape decides what it needs.
    """

    kv_share: float = 0.95
    max_reserve: float = 0.5
    refresh_steps: int = 16
    num_upcoming: int = 256


MAX_LOOKAHEAD = 1 << 16
"""Places from the memory end that are looked at for a request that fits, in doubling strides."""
TURN_SHARE = 0.1
"""A shared prefix longer than this share of the expected answer keeps a request in its turn."""
PREFILL_SHARE = 0.5
"""A request whose prefill is less than this share of its expected answer is no compute to ration."""

UNPROVEN_SHARE = 0.5
"""Part of the KV memory that forecasts may fill while estimates come from elsewhere and nothing has confirmed them. If
they are half the truth, what has entered by then still fits."""
UNPROVEN_PART = 16
MAX_UNPROVEN = 512
UNPROVEN_STEPS = 256
"""Estimates are taken as they are once a sixteenth of the requests have finished, but 512 at most, or after so many
steps. The first to finish are the shortest, which tell least."""


class BlendPolicy:
    """Admission and step mix by feedback; see the module.

    It looks at the running requests once per step, when it is first asked (`_look`), and counts on from there as
    requests enter.
    """

    name = "blend"

    def __init__(self, plan: Plan, settings: BlendSettings = BlendSettings()) -> None:
        self._plan = plan
        self._settings = settings
        self._learner = Learner(plan)
        self._scanner = DualScanner(plan.schedule.order, plan.samples)
        self._remaining = Remaining(plan)
        self._horizon = Horizon(self._scanner, self._learner)
        self._gate = MemoryGate(self._learner.lengths)
        self._is_at_memory_end = np.zeros(plan.num_requests, dtype=np.bool_)
        self._num_cached = np.zeros(plan.num_requests, dtype=np.int64)
        has_guesses = bool((plan.table.known_output_tokens < 0).any()) and not len(plan.samples)
        self._num_to_prove = min(plan.num_requests // UNPROVEN_PART, MAX_UNPROVEN)
        self._is_unproven = has_guesses
        self._step = 0
        self._looked_at_step = -1
        self._is_stale = True
        self._is_memory_end_full = False
        self._pending = self._pending_memory_end = 0
        self._budget = 0

    @property
    def num_waiting(self) -> int:
        return self._scanner.num_waiting

    @property
    def num_replans(self) -> int:
        """How often what waited was ordered anew."""
        return self._learner.num_replans

    def next(self, view: SchedulerView) -> Proposal | None:
        if not self._scanner.num_waiting:
            return None
        self._look(view)
        is_idle = not view.num_running
        if view.num_running >= view.max_num_seqs:
            return None
        if self._pending >= view.max_num_batched_tokens and not is_idle:
            return None
        sample = self._scanner.peek_first()
        request = self._next_at_memory_end()
        if request != NO_REQUEST and (sample == NO_REQUEST or self._plan.table.known_output_tokens[request] >= 0):
            return Proposal(request, is_at_memory_end=True)
        if request == NO_REQUEST and self._pending >= self._budget and not is_idle:
            return None
        request = self._scanner.peek_compute_end() if sample == NO_REQUEST else sample
        has_room = self._gate.has_room(request, self._step, float(self._remaining.own_tokens(request)))
        return Proposal(request) if has_room or is_idle else None

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:
        index, at_memory_end = proposal.index, proposal.is_at_memory_end
        own = int(self._plan.table.num_prompt_tokens[index]) - num_cached_tokens
        self._scanner.take(index)
        self._remaining.enter(index, own)
        self._horizon.enter(index, self._step)
        self._gate.enter(index, self._step, own, at_memory_end=at_memory_end)
        self._is_at_memory_end[index] = at_memory_end
        self._num_cached[index] = num_cached_tokens
        self._pending += own
        if at_memory_end:
            self._pending_memory_end += own

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:
        for _ in range(num_steps):
            self._look(view)
            self._step += 1
        return StepBudget(max(self._budget, self._pending_memory_end))

    def finished(self, index: int, num_output_tokens: int) -> None:
        self._learner.lengths.observe(index, num_output_tokens)
        self._num_to_prove -= 1

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._scanner.put_back(index, at_memory_end=bool(self._is_at_memory_end[index]))
        self._remaining.put_back(index)
        self._is_stale = True

    def next_use(self, key: Hashable) -> float:
        """Requests to pass before the block's subtree is reached from an end; 0 where keys are not the tree's."""
        if not isinstance(key, int):
            return 0.0
        node = key >> BLOCK_KEY_BITS
        if node >= self._plan.tree.num_nodes:
            return 0.0
        schedule = self._learner.schedule
        return self._scanner.distance(int(schedule.first_position[node]), int(schedule.last_position[node]))

    # The memory end

    def _next_at_memory_end(self) -> int:
        """The longest request that the forecast has room for: the next one, or a shorter one that ends before the peak.

        Looks ever further from the end; what shares a prefix worth more than its own answer is not taken out of turn.
        """
        request, distance = self._scanner.peek_memory_end(), 1
        while request != NO_REQUEST:
            is_in_turn = distance == 1 or not self._is_bound_to_neighbours(request)
            if is_in_turn and self._enters_as_it_fits(request) and self._fits_at_memory_end(request):
                return request
            if distance > MAX_LOOKAHEAD or self._is_memory_end_full:
                break
            request = self._scanner.look_past_memory_end(distance)
            distance = 2 * distance + 1
        self._is_memory_end_full = True
        return NO_REQUEST

    def _fits_at_memory_end(self, request: int) -> bool:
        own = float(self._remaining.own_tokens(request))
        return self._gate.has_room_at_memory_end(request, self._step, own)

    def _enters_as_it_fits(self, request: int) -> bool:
        """Is it nearly all decode, or memory-intensive? Others enter as prefill is wanted."""
        expected = self._learner.schedule.expected_output_tokens[request]
        is_decode = self._remaining.own_tokens(request) < PREFILL_SHARE * expected
        return bool(is_decode) or bool(self._remaining.are_memory_intensive(request))

    def _is_bound_to_neighbours(self, request: int) -> bool:
        schedule = self._learner.schedule
        return float(schedule.num_shared_tokens[request]) > TURN_SHARE * float(schedule.expected_output_tokens[request])

    # Once per step

    def _look(self, view: SchedulerView) -> None:
        """Look at what runs: the budget of the coming step follows from the KV that its decodes read."""
        if self._looked_at_step == self._step:
            return
        self._looked_at_step = self._step
        left = view.num_pending_tokens
        is_decoding = left == 0
        self._pending = int(left.sum())
        self._pending_memory_end = int(left[self._is_at_memory_end[view.request_index]].sum())
        if self._is_stale or self._step % self._settings.refresh_steps == 0:
            self._look_ahead(view)
        self._gate.limit = self._settings.kv_share * view.capacity_tokens * (UNPROVEN_SHARE if self._is_unproven else 1)
        self._budget = prefill_budget(
            self._plan.cost,
            self._rest(),
            RunningLoad(
                num_kv_tokens=float(view.num_computed_tokens[is_decoding].sum()),
                num_decodes=int(np.count_nonzero(is_decoding)),
                num_pending_tokens=self._pending,
            ),
            full_kv_tokens=self._gate.limit,
            max_num_batched_tokens=view.max_num_batched_tokens,
        )

    def _rest(self) -> RestOfJob:
        return RestOfJob(
            compute_s=self._remaining.compute_s,
            memory_s=self._remaining.memory_s,
            num_idle_steps=self._horizon.num_idle_steps(self._step),
            has_waiting=self._scanner.num_waiting > 0,
        )

    def _look_ahead(self, view: SchedulerView) -> None:
        """Forecast from scratch, and learn where there is enough to learn from."""
        self._is_stale = self._is_memory_end_full = False
        if self._learner.is_due:
            self._horizon.forget()
            self._replan(view)
        if self._num_to_prove <= 0 or self._step >= UNPROVEN_STEPS:
            self._is_unproven = False
        running, outputs = view.request_index, view.num_output_tokens
        lengths = self._learner.lengths
        own = (view.num_prompt_tokens - self._num_cached[running] + outputs).astype(np.float64)
        at_memory_end = self._is_at_memory_end[running]
        self._gate.rebuild(self._step, own, lengths.quantiles(running, outputs), at_memory_end)
        first, squared = lengths.moments(running, outputs)
        self._remaining.measure_running(self._pending, view.num_prompt_tokens + outputs, first, squared)
        self._horizon.measure_running(self._step, first)
        reserve = compute_end_reserve(
            self._plan,
            self._learner.schedule,
            self._upcoming(),
            present_tokens=float(own[~at_memory_end].sum()),
            budget=self._budget,
        )
        self._gate.reserve = min(reserve, self._settings.max_reserve * view.capacity_tokens)

    def _upcoming(self) -> Int64s:
        """What the compute end will deliver next: the last requests of a job are within reach of both ends, and most of
        them are not its own."""
        upcoming = self._scanner.upcoming(self._settings.num_upcoming)
        return upcoming[~self._remaining.are_memory_intensive(upcoming)]

    def _replan(self, view: SchedulerView) -> None:
        waiting = self._scanner.waiting()
        schedule = self._learner.refresh(view, waiting)
        if schedule is not None:
            self._scanner.reorder(schedule.order)
            self._remaining.replan(schedule, waiting)
