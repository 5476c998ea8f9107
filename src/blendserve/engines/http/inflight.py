"""The requests on their way to a remote server, as a policy may see them, and who joins them next.

The server tells nothing of its KV memory or its progress, so the view is an estimate: prompts count as computed at
once, outputs grow at the rate that finished requests had.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.engines.estimates import planned_cached_tokens
from blendserve.planner.base import Int64s, Policy
from blendserve.planner.plan import Plan

MAX_NUM_BATCHED_TOKENS = 8192
"""Of the unknown server; a policy may ask no more prefill than this of one step."""
RATE_WEIGHT = 0.1  # of the newest request in the mean seconds per output token
MAX_STEPS = 16  # that a policy is told of at once, however much time has passed


class HttpInflight:
    """At most `max_inflight` requests, and at most `kv_tokens` of prompts and expected outputs where that is not 0.

    It is the `SchedulerView` of its policy. Without `kv_tokens` the server is taken to hold `max_inflight` average
    requests.
    """

    def __init__(self, plan: Plan, policy: Policy, *, max_inflight: int, kv_tokens: int = 0) -> None:
        self._policy = policy
        self._table = plan.table
        self._expected = plan.expected_output_tokens
        self._cached = planned_cached_tokens(plan.tree)
        total = plan.table.num_prompt_tokens + self._expected
        mean = float(total.mean()) if len(total) else 1.0
        self._kv_tokens = kv_tokens
        self.capacity_tokens = kv_tokens or int(max_inflight * mean) + 1
        self.max_num_seqs = max_inflight
        self.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        self.num_running = 0
        self.max_running = 0
        self._held_tokens = 0.0
        self._index = np.zeros(max_inflight, np.int64)
        self._prompt = np.zeros(max_inflight, np.int64)
        self._output = np.zeros(max_inflight, np.int64)
        self._admitted_s: NDArray[np.float64] = np.zeros(max_inflight)
        self._row_of: dict[int, int] = {}
        self._s_per_token: float | None = None
        self._stepped_s: float | None = None

    # SchedulerView

    @property
    def free_tokens(self) -> int:
        num_running = self.num_running  # read once: progress is shown from another thread
        return max(0, self.capacity_tokens - int((self._prompt[:num_running] + self._output[:num_running]).sum()))

    @property
    def request_index(self) -> Int64s:
        return self._index[: self.num_running]

    @property
    def num_prompt_tokens(self) -> Int64s:
        return self._prompt[: self.num_running]

    @property
    def num_computed_tokens(self) -> Int64s:
        return self.num_prompt_tokens + self.num_output_tokens - 1

    @property
    def num_output_tokens(self) -> Int64s:
        return self._output[: self.num_running]

    @property
    def num_waiting(self) -> int:
        return self._policy.num_waiting

    @property
    def kv_use(self) -> float:
        """Expected share of the server's memory in use."""
        return 1 - self.free_tokens / self.capacity_tokens

    def admit(self, now_s: float) -> list[int]:
        """Take in as many requests as the policy proposes and the limits allow."""
        self._refresh(now_s)
        for _ in range(self._num_steps(now_s)):
            self._policy.prefill_tokens(self)
        admitted = []
        while self.num_running < self.max_num_seqs and (index := self._next()) is not None:
            self._policy.admitted(index, int(self._cached[index]))
            self._add(index, now_s)
            admitted.append(index)
        return admitted

    def finish(self, index: int, num_output_tokens: int, now_s: float) -> None:
        """A request has left, with so many tokens; 0 where it failed."""
        row = self._row_of.pop(index)
        if num_output_tokens:
            rate = (now_s - float(self._admitted_s[row])) / num_output_tokens
            known = self._s_per_token
            self._s_per_token = rate if known is None else (1 - RATE_WEIGHT) * known + RATE_WEIGHT * rate
        self._held_tokens -= self._size_of(index)
        self.num_running -= 1
        last = self.num_running
        if row != last:
            for column in (self._index, self._prompt, self._output, self._admitted_s):
                column[row] = column[last]
            self._row_of[int(self._index[row])] = row
        self._policy.finished(index, num_output_tokens)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.num_running <= self.max_num_seqs
        assert sorted(self._row_of.values()) == list(range(self.num_running))
        assert all(self._index[row] == index for index, row in self._row_of.items())
        assert abs(self._held_tokens - sum(map(self._size_of, self._row_of))) < 1e-6

    def _next(self) -> int | None:
        """The policy's proposal, in this step of the server or the next; None where it would wait or does not fit."""
        index = self._policy.next(self)
        if index is None and self._policy.num_waiting:
            self._policy.prefill_tokens(self)
            index = self._policy.next(self)
        if index is None:
            return None
        is_too_much = self._kv_tokens and self._held_tokens + self._size_of(index) > self._kv_tokens
        return None if is_too_much and self.num_running else index

    def _add(self, index: int, now_s: float) -> None:
        row = self.num_running
        self._index[row] = index
        self._prompt[row] = self._table.num_prompt_tokens[index]
        self._output[row] = 0
        self._admitted_s[row] = now_s
        self._row_of[index] = row
        self._held_tokens += self._size_of(index)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)

    def _size_of(self, index: int) -> float:
        return float(self._table.num_prompt_tokens[index]) + float(self._expected[index])

    def _refresh(self, now_s: float) -> None:
        if self._s_per_token:
            grown = ((now_s - self._admitted_s[: self.num_running]) / self._s_per_token).astype(np.int64)
            limits = np.maximum(self._table.max_output_tokens[self.request_index] - 1, 0)
            self._output[: self.num_running] = np.minimum(grown, limits)

    def _num_steps(self, now_s: float) -> int:
        """Steps that the server is likely to have made since the policy was last asked."""
        before, self._stepped_s = self._stepped_s, now_s
        if before is None or not self._s_per_token:
            return 1
        return int(min(max((now_s - before) / self._s_per_token, 1), MAX_STEPS))
