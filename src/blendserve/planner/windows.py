"""Jobs that have not arrived whole: plan what is here, go on planning while it runs (paper section 7).

One window is served while the next is read. When little of it waits, the rest and the next window are planned together,
so that both ends stay filled; what runs stays where it is, and what has finished goes on telling how long answers are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blendserve.costs.model_cost import CostModel
from blendserve.planner.base import Int64s, Policy, RequestTable, SchedulerView
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.sorting import FlatPrompts
from blendserve.planner.tree import PrefixTree
from blendserve.request import TokenIds

LOW_WATER = 0.25
"""Share of a window that still waits when the next one joins it."""

NUM_WITNESSES = 1024
"""Finished requests that are kept for what they tell of lengths; the latest, as what arrives may change."""


class Window(NamedTuple):
    """Requests that arrived together; indices go on from the window before."""

    prompts: FlatPrompts
    table: RequestTable


class _Row(NamedTuple):
    """A request of the present plan. Units: tokens; -1 where the length is not known."""

    prompt: TokenIds
    max_output_tokens: int
    known_output_tokens: int


class _Witness(NamedTuple):
    """A request that has finished, and how."""

    row: _Row
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class _LocalView:
    """A view whose running requests carry the numbers of the present plan."""

    view: SchedulerView
    request_index: Int64s

    @property
    def capacity_tokens(self) -> int:
        return self.view.capacity_tokens

    @property
    def free_tokens(self) -> int:
        return self.view.free_tokens

    @property
    def max_num_seqs(self) -> int:
        return self.view.max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        return self.view.max_num_batched_tokens

    @property
    def num_prompt_tokens(self) -> Int64s:
        return self.view.num_prompt_tokens

    @property
    def num_computed_tokens(self) -> Int64s:
        return self.view.num_computed_tokens

    @property
    def num_output_tokens(self) -> Int64s:
        return self.view.num_output_tokens


class WindowedPolicy:
    """Serves windows of requests with one policy after another; indices are the job's throughout.

    Keeps the prompts of unfinished requests, of `NUM_WITNESSES` finished ones and of the window ahead. Block keys must
    name contents (a tree's keys hold for one plan only), so prefix blocks are evicted least recently used first.
    """

    def __init__(self, windows: Iterator[Window], cost: CostModel, make: Callable[[Plan], Policy]) -> None:
        self._windows = (window for window in windows if len(window.table))
        self._cost = cost
        self._make = make
        self._num_arrived = 0
        self._row_by_index: dict[int, _Row] = {}
        self._witnesses: deque[_Witness] = deque(maxlen=NUM_WITNESSES)
        self._cached_by_running: dict[int, int] = {}
        self._indices = np.zeros(0, dtype=np.int64)
        self._window_size = 0
        self._next = next(self._windows, None)
        self._policy: Policy | None = None
        self.name = "windowed"
        self._plan_next_window()

    @property
    def num_waiting(self) -> int:
        assert self._policy is not None
        return self._policy.num_waiting + (len(self._next.table) if self._next is not None else 0)

    def next(self, view: SchedulerView) -> int | None:
        assert self._policy is not None
        while self._next is not None and self._policy.num_waiting <= LOW_WATER * self._window_size:
            self._plan_next_window()
        local = self._policy.next(self._local(view))
        return None if local is None else int(self._indices[local])

    def prefill_tokens(self, view: SchedulerView) -> int:
        assert self._policy is not None
        return self._policy.prefill_tokens(self._local(view))

    def admitted(self, index: int, num_cached_tokens: int) -> None:
        assert self._policy is not None
        self._cached_by_running[index] = num_cached_tokens
        self._policy.admitted(self._local_index(index), num_cached_tokens)

    def finished(self, index: int, num_output_tokens: int) -> None:
        assert self._policy is not None
        num_cached_tokens, row = self._cached_by_running.pop(index), self._row_by_index.pop(index)
        if row.known_output_tokens < 0 < num_output_tokens:
            self._witnesses.append(_Witness(row, num_cached_tokens, num_output_tokens))
        self._policy.finished(self._local_index(index), num_output_tokens)

    def preempted(self, index: int, num_output_tokens: int) -> None:
        assert self._policy is not None
        del self._cached_by_running[index]
        self._policy.preempted(self._local_index(index), num_output_tokens)

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0

    def _local(self, view: SchedulerView) -> _LocalView:
        return _LocalView(view, np.searchsorted(self._indices, view.request_index))

    def _local_index(self, index: int) -> int:
        return int(np.searchsorted(self._indices, index))

    def _plan_next_window(self) -> None:
        """Plan what waits, what runs and the next window together; read the window after it.

        Witnesses are part of the plan as requests that have left: they enter and end before anybody else.
        """
        self._take_in(self._next)
        self._next = next(self._windows, None)
        self._indices = np.array(sorted(self._row_by_index), dtype=np.int64)
        rows = [self._row_by_index[index] for index in self._indices.tolist()]
        witnesses = list(self._witnesses)
        self._policy = self._make(self._plan(rows + [witness.row for witness in witnesses]))
        self.name = f"{self._policy.name}-windowed"
        for local, witness in enumerate(witnesses, start=len(rows)):
            self._policy.admitted(local, witness.num_cached_tokens)
            self._policy.finished(local, witness.num_output_tokens)
        for index, num_cached_tokens in self._cached_by_running.items():
            self._policy.admitted(self._local_index(index), num_cached_tokens)

    def _plan(self, rows: list[_Row]) -> Plan:
        table = RequestTable(
            num_prompt_tokens=np.array([len(row.prompt) for row in rows], dtype=np.int64),
            max_output_tokens=np.array([row.max_output_tokens for row in rows], dtype=np.int64),
            known_output_tokens=np.array([row.known_output_tokens for row in rows], dtype=np.int64),
        )
        return make_plan(PrefixTree.from_prompts(row.prompt for row in rows), table, self._cost)

    def _take_in(self, window: Window | None) -> None:
        if window is None:
            return
        offsets, table = window.prompts.offsets, window.table
        for row in range(len(table)):
            self._row_by_index[self._num_arrived + row] = _Row(
                window.prompts.token_ids[offsets[row] : offsets[row + 1]],
                int(table.max_output_tokens[row]),
                int(table.known_output_tokens[row]),
            )
        self._num_arrived += len(table)
        self._window_size = len(table)
