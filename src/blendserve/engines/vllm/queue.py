"""A waiting queue for vLLM's scheduler that hands out requests as a policy proposes them, by exact memory and hits.

It has the methods of vLLM's `RequestQueue` and imports nothing of it. Until a run is bound to it, it is first come,
first served. Single requests, which no plan knows, go ahead of the policy's. vLLM asks it whether anything may start
(`bool`), looks at the first (`peek_request`), and pops what got memory; what it skips it pops and prepends again, what
it preempts it prepends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blendserve.engine.front import FIRST_INDEX
from blendserve.planner.base import EngineLimits, Int64s, Policy, Proposal, SchedulerView, scheduler_view

MAX_STEPS = 16
"""Steps without an admission that a policy is told of at once."""


def index_of(request: Any) -> int:
    """The row of a request of vLLM: its id is that row, with random letters behind it."""
    return int(request.request_id.partition("-")[0])


class SchedulerState:
    """What a policy may see of vLLM's own scheduler: exact between two steps."""

    def __init__(self, scheduler: Any, capacity_tokens: int, block_size: int) -> None:
        self.limits = EngineLimits(capacity_tokens, scheduler.max_num_running_reqs, scheduler.max_num_scheduled_tokens)
        self._scheduler = scheduler
        self._block_size = block_size
        self._key = (-1, -1)
        self._columns = _columns_of([])

    @property
    def step(self) -> int:
        return int(self._scheduler.current_step)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    def view(self) -> SchedulerView:
        """What a policy may see now."""
        pool = self._scheduler.kv_cache_manager.block_pool
        return scheduler_view(self.limits, int(pool.get_num_free_blocks()) * self._block_size, self._read())

    def num_cached_tokens(self, request: Any) -> int:
        """Prompt tokens of a waiting request that the prefix cache holds now."""
        return int(self._scheduler.kv_cache_manager.get_computed_blocks(request)[1])

    def _read(self) -> Int64s:
        running = self._scheduler.running
        key = (self.step, len(running))
        if key != self._key:
            self._key = key
            self._columns = _columns_of(running)
        return self._columns


def is_single(request: Any) -> bool:
    """Is this a request that no plan knows?"""
    return index_of(request) >= FIRST_INDEX


def _columns_of(running: Sequence[Any]) -> Int64s:
    """Index, prompt, computed and output tokens of a plan's requests: int64[4, num_running]."""
    running = [request for request in running if not is_single(request)]
    return np.array(
        [
            [index_of(request) for request in running],
            [request.num_prompt_tokens for request in running],
            [request.num_computed_tokens for request in running],
            [request.num_output_tokens for request in running],
        ],
        np.int64,
    )


class PolicyQueue:
    """Requests that wait. `supply` brings the request of an index into vLLM, and so into this queue; False where vLLM
    refuses it.
    """

    def __init__(self) -> None:
        self._arrived: deque[Any] = deque()
        self._singles: deque[Any] = deque()
        self._policy: Policy | None = None
        self._proposed: Any | None = None

    def bind(self, policy: Policy, state: SchedulerState, supply: Callable[[int], bool]) -> None:
        """Follow a policy from now on. Nothing may wait here yet."""
        assert not self._arrived, "bind before requests arrive"
        self._policy, self._state, self._supply = policy, state, supply
        self._held: dict[int, Any] = {}
        self._deferred: deque[Any] = deque()
        self._proposal = Proposal(-1)
        self._num_cached = 0
        self._step = state.step
        self.admitted: set[int] = set()
        """Indices that the policy has admitted and that have no end yet."""

    def unbind(self) -> None:
        """Be first come, first served again: the run is over, and what it had here was taken out."""
        self._policy = self._proposed = None
        self._arrived.extend(self._singles)
        self._singles.clear()

    def finish(self, index: int, num_output_tokens: int) -> None:
        """A request has ended, as its caller knows."""
        assert self._policy is not None
        self.admitted.discard(index)
        self._held.pop(index, None)
        self._policy.finished(index, num_output_tokens)

    # What vLLM calls

    def __bool__(self) -> bool:
        """May anything start now?"""
        if self._policy is None:
            return bool(self._arrived)
        first = next((queue[0] for queue in (self._deferred, self._singles) if queue), None)
        self._proposed = self._propose(self._policy) if first is None else first
        return self._proposed is not None

    def __len__(self) -> int:
        """Requests that wait, those included that vLLM has not been told of."""
        if self._policy is None:
            return len(self._arrived)
        return self._policy.num_waiting + len(self._deferred) + len(self._singles)

    def __iter__(self) -> Iterator[Any]:
        if self._policy is None:
            return iter(tuple(self._arrived))
        return iter((*self._deferred, *self._singles, *self._held.values()))

    def add_request(self, request: Any) -> None:
        if self._policy is None:
            self._arrived.append(request)
        elif is_single(request):
            self._singles.append(request)
        else:
            self._held[index_of(request)] = request

    def peek_request(self) -> Any:
        if self._policy is None:
            return self._arrived[0]
        if self._proposed is None and not self:
            raise IndexError("peek from an empty queue")
        return self._proposed

    def pop_request(self) -> Any:
        """Take out what was looked at: it has got its memory, or is skipped."""
        if self._policy is None:
            return self._arrived.popleft()
        request, self._proposed = self.peek_request(), None
        for queue in (self._deferred, self._singles):
            if queue:
                return queue.popleft()
        index = index_of(request)
        del self._held[index]
        self.admitted.add(index)
        self._policy.admitted(self._proposal, self._num_cached)
        return request

    def prepend_request(self, request: Any) -> None:
        """Take back a preempted request: the policy decides when it comes again."""
        if self._policy is None:
            self._arrived.appendleft(request)
            return
        if is_single(request):
            self._singles.appendleft(request)
            return
        index = index_of(request)
        self._held[index] = request
        self.admitted.discard(index)
        self._policy.preempted(index, request.num_output_tokens)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Take back what was skipped in this step, last one first: it has its turn already."""
        (self._arrived if self._policy is None else self._deferred).extendleft(requests)

    def remove_request(self, request: Any) -> None:
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Any]) -> None:
        removed = set(requests)
        self._proposed = None
        if self._policy is None:
            self._arrived = deque(request for request in self._arrived if request not in removed)
            return
        self._deferred = deque(request for request in self._deferred if request not in removed)
        self._singles = deque(request for request in self._singles if request not in removed)
        self._held = {index: request for index, request in self._held.items() if request not in removed}

    def _propose(self, policy: Policy) -> Any | None:
        """The policy's next request, brought in if it is not here yet."""
        self._pass_steps(policy)
        if len(self.admitted) >= self._state.limits.max_num_seqs:  # of those skipped, many may have their turn already
            return None
        while (proposal := policy.next(self._state.view())) is not None:
            index = proposal.index
            if index in self._held or self._supply(index):
                request = self._held[index]
                self._proposal, self._num_cached = proposal, self._state.num_cached_tokens(request)
                return request
            policy.admitted(proposal, 0)
            policy.finished(index, 0)
        return None

    def _pass_steps(self, policy: Policy) -> None:
        """Tell the policy of the steps since it was last asked."""
        num_steps = min(self._state.step - self._step, MAX_STEPS)
        if num_steps:
            policy.begin_step(self._state.view(), num_steps)
        self._step = self._state.step
