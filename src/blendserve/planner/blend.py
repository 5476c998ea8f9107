"""The default policy: both resources in the proportion in which they remain, and a KV memory that stays full.

Four rules (docs/paper-map.md, beyond the paper). Every step gets an even share of the compute that remains, over the
fewest steps that the rest of the job can take: those that read the remaining KV at full memory, or the longest request.
At a full memory that is the ratio of what remains of the two resources; while memory fills up, it wastes no step. The
memory end enters as the forecast of its peak allows, longest first because that is how densities fall. The compute end
enters as prefill is wanted. What finishes corrects the estimates.

On an engine that does not overlap the two, their mix is of no matter: steps are filled up, unless something that runs
is longer than all that waits, so that there will be steps anyway.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s, SchedulerView
from blendserve.planner.forecast import KvForecast
from blendserve.planner.learner import Learner
from blendserve.planner.plan import Plan
from blendserve.planner.scanner import NO_REQUEST, DualScanner
from blendserve.planner.tree import BLOCK_KEY_BITS


@dataclass(frozen=True, slots=True)
class BlendSettings:
    """`kv_share`: share of the KV memory that forecasts may fill; more loses to preemption, less leaves steps empty.
    `max_reserve`: most of it that is held for the compute end. `refresh_steps`: steps between two forecasts from
    scratch. `window`: requests at the compute end whose shape decides what it needs.
    """

    kv_share: float = 0.95
    max_reserve: float = 0.5
    refresh_steps: int = 16
    window: int = 256


MAX_PREFILL_STEPS = 16
"""What is admitted holds memory: its prefill takes about this many steps at most, and no more than needed once nothing
waits."""
EVEN_SHARE = 0.5
"""Part of a full step's memory time that every step counts for when compute is shared out, however little it reads."""
TRUST_TOKENS = 256
"""Prompt tokens that must have been planned before the sharing found in the engine outweighs the planned sharing."""


LOOK_AGAIN = 0.9
"""Share of the waiting requests that may be left before their longest output is estimated anew."""
NEXT_REQUESTS = 8
"""Requests at an end that count as next."""
MAX_LOOKAHEAD = 1 << 16
"""Places from the memory end that are looked at for a request that fits, in doubling strides."""
TURN_SHARE = 0.1
"""A shared prefix longer than this share of the expected answer keeps a request in its turn."""
PREFILL_SHARE = 0.5
"""A request whose prefill is less than this share of its expected answer is no compute to ration."""


class BlendPolicy:
    """Admission and step mix by feedback; see the module."""

    name = "blend"

    def __init__(self, plan: Plan, settings: BlendSettings = BlendSettings()) -> None:
        self._plan = plan
        self._settings = settings
        self._learner = Learner(plan)
        self._schedule = plan.schedule
        self._scanner = DualScanner(plan.schedule.order, plan.samples)
        self._is_at_memory_end = np.zeros(plan.num_requests, dtype=np.bool_)
        self._num_cached = np.zeros(plan.num_requests, dtype=np.int64)
        self._all = KvForecast()
        self._memory_end = KvForecast()
        self._step = 0
        self._is_new_step = True
        self._is_stale = True
        self._is_memory_end_full = False
        self._proposed_at_memory_end = False
        self._proposed_remaining = np.zeros(1)
        self._pending = self._pending_memory_end = 0
        self._budget = 0
        self._reserve = 0.0
        self._running_compute_s = self._running_memory_s = 0.0
        self._waiting_compute_s = float(self._schedule.compute_s.sum())
        self._waiting_memory_s = float(self._schedule.memory_s.sum())
        self._end = 0.0
        self._longest_unknown, self._num_weighed = 0.0, math.inf
        self._waiting_prefill_s = float(self._prefill_s().sum())
        self._planned_tokens = self._actual_tokens = float(TRUST_TOKENS)

    @property
    def num_waiting(self) -> int:
        return self._scanner.num_waiting

    @property
    def num_replans(self) -> int:
        """How often what waited was ordered anew."""
        return self._learner.num_replans

    def next(self, view: SchedulerView) -> int | None:
        if not self._scanner.num_waiting:
            return None
        if self._is_new_step:
            self._begin_step(view)
        is_idle = not len(view.request_index)
        if len(view.request_index) >= view.max_num_seqs:
            return None
        if self._pending >= view.max_num_batched_tokens and not is_idle:
            return None
        limit = self._settings.kv_share * view.capacity_tokens
        self._proposed_at_memory_end = False
        sample = self._scanner.peek_first()
        request = self._next_at_memory_end(limit)
        if request != NO_REQUEST and (sample == NO_REQUEST or self._plan.table.known_output_tokens[request] >= 0):
            self._proposed_at_memory_end = True
            return request
        if request == NO_REQUEST and self._pending >= self._budget and not is_idle:
            return None
        request = self._scanner.peek_compute_end() if sample == NO_REQUEST else sample
        return request if self._fits(self._all, request, limit) or is_idle else None

    def prefill_tokens(self, view: SchedulerView) -> int:
        if self._is_new_step:
            self._begin_step(view)
        self._step += 1
        self._is_new_step = True
        return max(self._budget, self._pending_memory_end)

    def admitted(self, index: int, num_cached_tokens: int) -> None:
        schedule = self._schedule
        self._scanner.take(index)
        self._waiting_compute_s -= float(schedule.compute_s[index])
        self._waiting_memory_s -= float(schedule.memory_s[index])
        self._waiting_prefill_s -= float(self._prefill_s(index))
        self._running_compute_s += float(schedule.compute_s[index])
        self._running_memory_s += float(schedule.memory_s[index])
        self._is_at_memory_end[index] = self._proposed_at_memory_end
        self._num_cached[index] = num_cached_tokens
        own = int(self._plan.table.num_prompt_tokens[index]) - num_cached_tokens
        self._pending += own
        self._planned_tokens += float(self._own_tokens(index))
        self._actual_tokens += own
        self._end = max(self._end, self._step + float(schedule.expected_output_tokens[index]))
        self._all.add(self._step, own, self._proposed_remaining)
        if self._proposed_at_memory_end:
            self._pending_memory_end += own
            self._memory_end.add(self._step, own, self._proposed_remaining)

    def finished(self, index: int, num_output_tokens: int) -> None:
        self._learner.lengths.observe(index, num_output_tokens)

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._scanner.put_back(index, at_memory_end=bool(self._is_at_memory_end[index]))
        self._waiting_compute_s += float(self._schedule.compute_s[index])
        self._waiting_memory_s += float(self._schedule.memory_s[index])
        self._waiting_prefill_s += float(self._prefill_s(index))
        self._is_stale = True

    def next_use(self, key: Hashable) -> float:
        """Requests to pass before the block's subtree is reached from an end; 0 where keys are not the tree's."""
        if not isinstance(key, int):
            return 0.0
        node = key >> BLOCK_KEY_BITS
        if node >= self._plan.tree.num_nodes:
            return 0.0
        schedule = self._schedule
        return self._scanner.distance(int(schedule.first_position[node]), int(schedule.last_position[node]))

    def _next_at_memory_end(self, limit: float) -> int:
        """The longest request that the forecast has room for: the next one, or a shorter one that ends before the peak.

        Looks ever further from the end; what shares a prefix worth more than its own answer is not taken out of turn.
        """
        request, distance = self._scanner.peek_memory_end(), 1
        while request != NO_REQUEST:
            is_in_turn = distance == 1 or not self._is_bound_to_neighbours(request)
            if is_in_turn and self._enters_as_it_fits(request) and self._fits_at_memory_end(request, limit):
                return request
            if distance > MAX_LOOKAHEAD or self._is_memory_end_full:
                break
            request = self._scanner.look_past_memory_end(distance)
            distance = 2 * distance + 1
        self._is_memory_end_full = True
        return NO_REQUEST

    def _fits_at_memory_end(self, request: int, limit: float) -> bool:
        reserved = limit - self._reserve
        return self._fits(self._memory_end, request, reserved) and self._fits(self._all, request, limit)

    def _enters_as_it_fits(self, request: int) -> bool:
        """Is it nearly all decode, or memory-intensive? Others enter as prefill is wanted."""
        is_decode = self._own_tokens(request) < PREFILL_SHARE * self._schedule.expected_output_tokens[request]
        return bool(is_decode) or bool(self._are_memory_intensive(request))

    def _are_memory_intensive(self, requests: Int64s | int) -> NDArray[np.bool_]:
        """Have they less compute to their memory time than all that remains?"""
        compute_s = self._waiting_compute_s + self._running_compute_s
        memory_s = self._waiting_memory_s + self._running_memory_s
        schedule = self._schedule
        return schedule.compute_s[requests] * memory_s < compute_s * schedule.memory_s[requests]

    def _own_tokens(self, requests: Int64s | int) -> Int64s:
        """Prompt tokens that are planned to be computed, those before them having been."""
        own: Int64s = self._plan.table.num_prompt_tokens[requests] - self._schedule.num_shared_tokens[requests]
        return own

    def _prefill_s(self, requests: Int64s | int | slice = slice(None)) -> Floats:
        """Compute of requests before their decodes."""
        schedule = self._schedule
        decode_s = self._plan.cost.decode_s * schedule.expected_output_tokens[requests]
        prefill_s: Floats = np.maximum(schedule.compute_s[requests] - decode_s, 0.0)
        return prefill_s

    def _is_bound_to_neighbours(self, request: int) -> bool:
        schedule = self._schedule
        return float(schedule.num_shared_tokens[request]) > TURN_SHARE * float(schedule.expected_output_tokens[request])

    def _fits(self, forecast: KvForecast, request: int, limit: float) -> bool:
        self._proposed_remaining = self._learner.lengths.outset(request)
        own = float(self._own_tokens(request))
        return forecast.fits(request, self._step, own, self._proposed_remaining, limit)

    def _begin_step(self, view: SchedulerView) -> None:
        """Look at what runs: the budget of the coming step follows from the KV that its decodes read."""
        self._is_new_step = False
        computed = view.num_computed_tokens
        left = np.maximum(view.num_prompt_tokens + view.num_output_tokens - 1 - computed, 0)
        is_decoding = left == 0
        self._pending = int(left.sum())
        self._pending_memory_end = int(left[self._is_at_memory_end[view.request_index]].sum())
        if self._is_stale or self._step % self._settings.refresh_steps == 0:
            self._look_ahead(view)
        sharing_lost = self._actual_tokens / self._planned_tokens - 1.0
        waiting_s = self._waiting_compute_s + sharing_lost * self._waiting_prefill_s
        compute_s = max(waiting_s + self._running_compute_s, 0.0)
        num_kv_tokens = float(computed[is_decoding].sum())
        cost = self._plan.cost
        tokens = compute_s / cost.token_s * self._step_share(view, num_kv_tokens)
        urgent = self._pending / (MAX_PREFILL_STEPS if self._scanner.num_waiting else 1)
        wanted = max(tokens - np.count_nonzero(is_decoding) * cost.decode_s / cost.token_s, urgent)
        self._budget = int(min(max(wanted, 1.0), view.max_num_batched_tokens))

    def _step_share(self, view: SchedulerView, num_kv_tokens: float) -> float:
        """Which part of the remaining compute belongs into a step that reads `num_kv_tokens`.

        In proportion to the memory time of the step, all steps bearing `EVEN_SHARE` of a full one besides: the first
        keeps compute for the memory to come, the second wastes no step while memory fills up.
        """
        kv_token_s = self._plan.cost.kv_token_s
        if not self._plan.cost.has_overlap:
            return 1.0 / max(self._num_idle_steps(), 1.0)
        even_s = EVEN_SHARE * self._settings.kv_share * view.capacity_tokens * kv_token_s
        remaining_s = self._waiting_memory_s + self._running_memory_s + even_s * self._num_steps_left(view)
        return min(1.0, (kv_token_s * num_kv_tokens + even_s) / max(remaining_s, 1e-12))

    def _num_steps_left(self, view: SchedulerView) -> float:
        """Steps over which to spread the compute: those that read all KV at full memory, or that the longest request
        is expected to run; but what waits must start early enough to end with it."""
        memory_s = self._waiting_memory_s + self._running_memory_s
        full_s = self._settings.kv_share * view.capacity_tokens * self._plan.cost.kv_token_s
        return max(memory_s / full_s, self._num_idle_steps(), 1.0)

    def _num_idle_steps(self) -> float:
        """Steps that there will be anyway, because something running is longer than all that waits."""
        return self._end - self._step - self._longest_waiting()

    def _longest_waiting(self) -> float:
        """Output tokens that the longest waiting request is expected to have: one of the next at the memory end, or the
        longest of many that nothing is known of."""
        num_waiting = self._scanner.num_waiting
        if not num_waiting:
            return 0.0
        if num_waiting < LOOK_AGAIN * self._num_weighed:
            self._num_weighed = num_waiting
            self._longest_unknown = self._learner.lengths.longest_unknown(self._scanner.waiting())
        known = self._schedule.expected_output_tokens[self._scanner.first_at_memory_end(NEXT_REQUESTS)]
        return max(self._longest_unknown, float(known.max(initial=0.0)))

    def _look_ahead(self, view: SchedulerView) -> None:
        """Forecast from scratch, and learn where there is enough to learn from."""
        self._is_stale = self._is_memory_end_full = False
        if self._learner.is_due:
            self._num_weighed = math.inf
            self._replan(view)
        running, outputs = view.request_index, view.num_output_tokens
        lengths, cost = self._learner.lengths, self._plan.cost
        own = view.num_prompt_tokens - self._num_cached[running] + outputs
        remaining = lengths.quantiles(running, outputs)
        at_memory_end = self._is_at_memory_end[running]
        self._all.rebuild(self._step, own.astype(np.float64), remaining)
        self._memory_end.rebuild(self._step, own[at_memory_end].astype(np.float64), remaining[at_memory_end])

        first, squared = lengths.moments(running, outputs)
        held = view.num_prompt_tokens + outputs
        self._running_compute_s = cost.token_s * self._pending + cost.decode_s * float(first.sum())
        self._end = self._step + float(first.max(initial=0.0))
        self._running_memory_s = cost.kv_token_s * float((held * first + squared / 2).sum())
        present = float(own[~at_memory_end].sum())
        reserve = max(present, self._steady_compute_end()) + self._next_prompt_tokens()
        self._reserve = min(reserve, self._settings.max_reserve * view.capacity_tokens)

    def _next_prompt_tokens(self) -> float:
        """Room that the largest of the next requests at the compute end needs to enter at all."""
        return float(self._plan.table.num_prompt_tokens[self._upcoming()].max(initial=0))

    def _upcoming(self) -> Int64s:
        """What the compute end will deliver next: the last requests of a job are within reach of both ends, and most of
        them are not its own."""
        upcoming = self._scanner.upcoming(self._settings.window)
        return upcoming[~self._are_memory_intensive(upcoming)]

    def _steady_compute_end(self) -> float:
        """KV tokens that the compute end holds when it delivers the budget in every step (Little's law)."""
        upcoming = self._upcoming()
        if not len(upcoming):
            return 0.0
        cost, schedule = self._plan.cost, self._schedule
        expected = schedule.expected_output_tokens[upcoming]
        decodes_s = cost.decode_s * float(expected.sum())
        prefill = (float(schedule.compute_s[upcoming].sum()) - decodes_s) / cost.token_s
        token_steps = float(schedule.memory_s[upcoming].sum()) / cost.kv_token_s
        return self._budget * token_steps / max(prefill, 1.0)

    def _replan(self, view: SchedulerView) -> None:
        waiting = self._scanner.waiting()
        schedule = self._learner.refresh(view, waiting)
        if schedule is not None:
            self._schedule = schedule
            self._scanner.reorder(schedule.order)
            self._waiting_compute_s = float(schedule.compute_s[waiting].sum())
            self._waiting_memory_s = float(schedule.memory_s[waiting].sum())
            self._waiting_prefill_s = float(self._prefill_s(waiting).sum())
