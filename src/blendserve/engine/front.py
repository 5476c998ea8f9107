"""Requests that go ahead of a plan: single questions are admitted before what is planned, into the same steps.

The plan's policy never sees them. Any thread may add requests; everything else happens in the engine's thread, between
two steps. `Front.run` does it for our own loop; other engines take what waits by themselves.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from blendserve.engine.loop import EngineLoop
from blendserve.engine.sequence import SequenceTable
from blendserve.planner.base import Policy, Proposal, SchedulerView, StepBudget
from blendserve.request import Request, RequestSource, SequenceOutput, TokenIds

FIRST_INDEX = 1 << 40
"""Indices from here on are not those of a plan."""


class _FrontKey(NamedTuple):
    """The key of a cached block that no plan knows."""

    key: Hashable


class Front:
    """The requests that go ahead. `on_tokens` is told the output tokens so far of a request that runs, after every
    step; `on_output` its end.
    """

    def __init__(
        self, on_tokens: Callable[[int, TokenIds], None], on_output: Callable[[int, SequenceOutput], None]
    ) -> None:
        self._on_tokens = on_tokens
        self._on_output = on_output
        self._lock = threading.Lock()
        self._numbers = count(FIRST_INDEX)
        self._requests: dict[int, Request] = {}
        self._bodies: dict[int, bytes] = {}
        self._waiting: deque[int] = deque()
        self._unwanted: set[int] = set()
        self._is_held = False

    def add(self, requests: Sequence[Request], body: bytes = b"") -> list[int]:
        """Queue the requests of one line. `body`: what of it the engine itself reads. Returns: the index of each."""
        with self._lock:
            indices = [next(self._numbers) for _ in requests]
            for index, request in zip(indices, requests, strict=True):
                keys = tuple(_FrontKey(key) for key in request.block_keys)
                self._requests[index] = replace(request, index=index, block_keys=keys)
                self._bodies[index] = body
            self._waiting.extend(indices)
        return indices

    def withdraw(self, indices: Sequence[int]) -> None:
        """Forget those of these requests that wait. Engines that can stop those that run do so."""
        with self._lock:
            for index in indices:
                if index in self._waiting:
                    self._waiting.remove(index)
                    self._forget(index)
                elif index in self._requests:
                    self._unwanted.add(index)

    @property
    def num_waiting(self) -> int:
        return 0 if self._is_held else len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def hold(self) -> None:
        """Let nobody else in during this run, so that it ends with what runs."""
        self._is_held = True

    def run(self, engine: EngineLoop, source: RequestSource, policy: Policy) -> Iterator[SequenceOutput]:
        """Run a plan, and whatever is added meanwhile. Yields: outputs of the plan. Requests of the front that have not
        ended when the run does go ahead of the next one.
        """
        self.open()
        outputs = engine.run(_Source(source, self), _FrontPolicy(policy, self, engine.batcher.table))
        try:
            for output in outputs:
                if output.index < FIRST_INDEX:
                    yield output
                else:
                    self.end(output)
        finally:
            self.start_over()

    def open(self) -> None:
        """Let requests in, as a run begins."""
        self._is_held = False

    def start_over(self) -> None:
        """What has no end yet waits again, as a run ends or the engine is lost. Nobody gets what nobody wants."""
        with self._lock:
            for index in self._unwanted & self._requests.keys():
                self._forget(index)
            self._unwanted.clear()
            self._waiting = deque(sorted(self._requests))

    def take(self) -> list[int]:
        """All that may come in now: they wait no longer."""
        with self._lock:
            taken = [] if self._is_held else list(self._waiting)
            if taken:
                self._waiting.clear()
        return taken

    def take_unwanted(self) -> list[int]:
        """Requests that run and that nobody waits for any more. They are forgotten: the caller stops them."""
        if not self._unwanted:
            return []
        with self._lock:
            taken = sorted(self._unwanted & self._requests.keys())
            self._unwanted.clear()
            for index in taken:
                self._forget(index)
        return taken

    def body(self, index: int) -> bytes:
        """What the engine itself reads of a request's line."""
        return self._bodies[index]

    def tell(self, index: int, token_ids: TokenIds) -> None:
        """A request that runs has written so much."""
        self._on_tokens(index, token_ids)

    def end(self, output: SequenceOutput) -> None:
        """A request has ended."""
        with self._lock:
            is_wanted = output.index in self._requests
            if is_wanted:
                self._forget(output.index)
        if is_wanted:
            self._on_output(output.index, output)

    def request(self, index: int) -> Request:
        return self._requests[index]

    def first(self) -> int | None:
        return self._waiting[0] if self.num_waiting else None

    def admitted(self, index: int) -> None:
        with self._lock:
            self._waiting.remove(index)

    def preempted(self, index: int) -> None:
        with self._lock:
            self._waiting.appendleft(index)

    def watch(self, table: SequenceTable) -> None:
        """Tell what has come of the requests that run."""
        for row in (table.request_index >= FIRST_INDEX).nonzero()[0].tolist():
            self.tell(int(table.request_index[row]), table.output_token_ids(row))

    def _forget(self, index: int) -> None:
        del self._requests[index], self._bodies[index]


class _Source:
    """The requests of a plan, and those of the front behind them."""

    def __init__(self, source: RequestSource, front: Front) -> None:
        self._source = source
        self._front = front

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Request:
        return self._source[index] if index < FIRST_INDEX else self._front.request(index)


class _FrontPolicy:
    """A `Policy` that proposes the front's requests first, and shows the plan's own policy its own requests alone."""

    def __init__(self, policy: Policy, front: Front, table: SequenceTable) -> None:
        self.name = policy.name
        self._policy = policy
        self._front = front
        self._table = table

    @property
    def num_waiting(self) -> int:
        return self._policy.num_waiting + self._front.num_waiting

    def next(self, view: SchedulerView) -> Proposal | None:
        first = self._front.first()
        if first is not None:
            return Proposal(first)
        return self._policy.next(_of_plan(view)) if self._policy.num_waiting else None

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:
        if proposal.index < FIRST_INDEX:
            self._policy.admitted(proposal, num_cached_tokens)
        else:
            self._front.admitted(proposal.index)

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:
        self._front.watch(self._table)
        own = _of_plan(view)
        if own is view:
            return self._policy.begin_step(view, num_steps)
        if not own.num_running:
            return StepBudget(view.max_num_batched_tokens)
        budget = self._policy.begin_step(own, num_steps).num_prefill_tokens
        num_ahead = int(view.num_pending_tokens.sum() - own.num_pending_tokens.sum())
        return StepBudget(min(view.max_num_batched_tokens, budget + num_ahead))

    def finished(self, index: int, num_output_tokens: int) -> None:
        if index < FIRST_INDEX:
            self._policy.finished(index, num_output_tokens)

    def preempted(self, index: int, num_output_tokens: int) -> None:
        if index < FIRST_INDEX:
            self._policy.preempted(index, num_output_tokens)
        else:
            self._front.preempted(index)

    def next_use(self, key: Hashable) -> float:
        return math.inf if isinstance(key, _FrontKey) else self._policy.next_use(key)


def _of_plan(view: SchedulerView) -> SchedulerView:
    """What a policy sees of its own requests; the view itself where there are no others."""
    is_own = view.request_index < FIRST_INDEX
    if is_own.all():
        return view
    return view._replace(
        request_index=view.request_index[is_own],
        num_prompt_tokens=view.num_prompt_tokens[is_own],
        num_computed_tokens=view.num_computed_tokens[is_own],
        num_output_tokens=view.num_output_tokens[is_own],
    )


class NothingPlanned:
    """The policy of an empty plan: the front alone has requests."""

    name = "front"
    num_waiting = 0

    def next(self, view: SchedulerView) -> Proposal | None:  # noqa: ARG002
        return None

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:  # noqa: ARG002
        raise AssertionError("nothing is planned")

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:  # noqa: ARG002
        return StepBudget(view.max_num_batched_tokens)

    def finished(self, index: int, num_output_tokens: int) -> None:
        """Nothing is planned."""

    def preempted(self, index: int, num_output_tokens: int) -> None:
        """Nothing is planned."""

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0
