"""The requests inside vLLM as a policy may see them from outside, and who joins them next.

vLLM tells how full its KV memory is and who has ended. How far the others are follows from its way of filling a step:
every decode first, then prompts in the order of their admission up to the token budget.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from blendserve.engines.estimates import planned_cached_tokens
from blendserve.engines.vllm.api import VllmLimits
from blendserve.planner.base import Int64s, Policy
from blendserve.planner.forecast import KvForecast
from blendserve.planner.plan import Plan

REFRESH_GROWTH = 1.1
"""Lengths are estimated anew whenever this many times more requests have finished."""
MIN_NEW_OBSERVATIONS = 16


class StepLoad(NamedTuple):
    """What a step was made of, as far as it can be seen from outside. `num_pairs`: prefill tokens times the tokens that
    they attend to; `num_kv_tokens`: KV that decodes read; `num_sampled_tokens`: after which a next one is chosen.
    """

    num_prefill_tokens: int
    num_decode_tokens: int
    num_pairs: float
    num_kv_tokens: float
    num_sampled_tokens: int


class VllmInflight:
    """At most `max_inflight` requests, and no more than the KV memory will hold: what is in use now, what admitted
    prompts have yet to take, and the expected remainder of all outputs, at its peak.

    It is the `SchedulerView` of its policy. Rows are in the order of admission.
    """

    def __init__(self, plan: Plan, policy: Policy, limits: VllmLimits, max_inflight: int) -> None:
        self._policy = policy
        self._table = plan.table
        self._planned_cached = planned_cached_tokens(plan.tree) // limits.block_size * limits.block_size
        self._lengths = plan.new_lengths()
        self._next_refresh = MIN_NEW_OBSERVATIONS
        self._forecast = KvForecast()
        self._step = 0
        self._block_size = limits.block_size
        self.capacity_tokens = limits.capacity_tokens
        self.max_num_seqs = max_inflight
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        self._used_tokens = 0
        self.num_running = 0
        shape = max_inflight
        self._index = np.zeros(shape, np.int64)
        self._prompt = np.zeros(shape, np.int64)
        self._start = np.zeros(shape, np.int64)
        self._computed = np.zeros(shape, np.int64)
        self._output = np.zeros(shape, np.int64)

    # SchedulerView

    @property
    def free_tokens(self) -> int:
        return max(0, self.capacity_tokens - self._used_tokens - self._num_pending_tokens())

    @property
    def request_index(self) -> Int64s:
        return self._index[: self.num_running]

    @property
    def num_prompt_tokens(self) -> Int64s:
        return self._prompt[: self.num_running]

    @property
    def num_computed_tokens(self) -> Int64s:
        return self._computed[: self.num_running]

    @property
    def num_output_tokens(self) -> Int64s:
        return self._output[: self.num_running]

    @property
    def num_waiting(self) -> int:
        return self._policy.num_waiting

    @property
    def num_left(self) -> int:
        """Requests that have no end yet."""
        return self.num_running + self._policy.num_waiting

    def admit(self, kv_use: float) -> list[int]:
        """Take in as many requests as the policy proposes and the memory, `kv_use` of it in use, will hold."""
        self._used_tokens = round(kv_use * self.capacity_tokens)
        limit = self._look_ahead()
        admitted = []
        while self.num_running < self.max_num_seqs and (index := self._policy.next(self)) is not None:
            if self.num_running and not self._fits(index, limit):
                break
            self._policy.admitted(index, int(self._planned_cached[index]))
            self._add(index)
            admitted.append(index)
        self._policy.prefill_tokens(self)
        return admitted

    def adopt(self, indices: list[int]) -> None:
        """Take over requests that the policy has admitted already."""
        for index in indices:
            self._add(index)

    def advance(self) -> StepLoad:
        """A step has run: move everyone on."""
        self._step += 1
        computed, output = self.num_computed_tokens, self.num_output_tokens
        left = self.num_prompt_tokens + output - computed
        is_decoding = (output > 0) & (left == 1)
        num_decodes = int(np.count_nonzero(is_decoding))
        to_prefill = np.where(is_decoding, 0, left)
        before = np.cumsum(to_prefill) - to_prefill
        chunk = np.clip(max(0, self.max_num_batched_tokens - num_decodes) - before, 0, to_prefill)
        load = StepLoad(
            num_prefill_tokens=int(chunk.sum()),
            num_decode_tokens=num_decodes,
            num_pairs=float((chunk * (computed + chunk / 2)).sum()),
            num_kv_tokens=float(computed[is_decoding].sum()),
            num_sampled_tokens=num_decodes + int(np.count_nonzero((chunk > 0) & (chunk == left))),
        )
        can_grow = output < np.maximum(self._table.max_output_tokens[self.request_index] - 1, 1)
        chunk += is_decoding & can_grow
        computed += chunk
        output += (chunk > 0) & (chunk == left) & can_grow
        self.num_computed_tokens[:] = np.minimum(computed, self.num_prompt_tokens + output - 1)
        return load

    def preempt(self, count: int) -> None:
        """vLLM has taken the memory of so many requests, as it does from the youngest: they compute it all again."""
        (has_run,) = np.nonzero(self.num_computed_tokens > self._start[: self.num_running])
        rows = has_run[len(has_run) - min(count, len(has_run)) :]
        self._computed[rows] = self._start[rows] = 0

    def finish(self, index: int, num_output_tokens: int) -> None:
        """A request has ended; 0 tokens where it was refused."""
        (rows,) = np.nonzero(self.request_index == index)
        row = int(rows[0])
        last = self.num_running - 1
        for column in (self._index, self._prompt, self._start, self._computed, self._output):
            column[row:last] = column[row + 1 : last + 1]
        self.num_running = last
        self._policy.finished(index, num_output_tokens)
        self._lengths.observe(index, num_output_tokens)

    def start_over(self) -> list[int]:
        """Every request inside is to be computed again, in this order: the engine that had them is gone."""
        self._used_tokens = 0
        self._computed[: self.num_running] = 0
        self._start[: self.num_running] = 0
        self._output[: self.num_running] = 0
        return [int(index) for index in self.request_index]

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.num_running <= self.max_num_seqs
        assert len(set(self.request_index.tolist())) == self.num_running
        assert (self.num_computed_tokens >= 0).all()
        assert (self.num_computed_tokens < self.num_prompt_tokens + np.maximum(self.num_output_tokens, 1)).all()

    def _num_pending_tokens(self) -> int:
        """Tokens of prompts that have yet to take their memory: of those that have not run, all, for what is planned to
        be shared may not be there yet.
        """
        total, computed = self.num_prompt_tokens + self.num_output_tokens, self.num_computed_tokens
        has_run = computed > self._start[: self.num_running]
        return int(np.where(has_run, np.maximum(total - computed - 1, 0), total).sum())

    def _look_ahead(self) -> float:
        """Forecast from scratch, as if nothing were shared; returns the limit for that. What sharing spares now is
        taken to stay.
        """
        running, outputs = self.request_index, self.num_output_tokens
        if self._lengths.num_observed >= self._next_refresh:
            self._lengths.refresh(running, outputs)
            observed = self._lengths.num_observed
            self._next_refresh = max(observed + MIN_NEW_OBSERVATIONS, int(observed * REFRESH_GROWTH))
        own = self.num_prompt_tokens + outputs
        self._forecast.rebuild(self._step, self._at_most(own), self._lengths.quantiles(running, outputs))
        in_blocks = int((-(-own // self._block_size) * self._block_size).sum())
        return self.capacity_tokens + max(0, in_blocks - self._used_tokens - self._num_pending_tokens())

    def _at_most(self, num_tokens: Any) -> Any:
        """What tokens may take of the memory: the last block of a request may hold one. Requests that start together
        fill their blocks together, so an average would not do.
        """
        return num_tokens + self._block_size - 1.0

    def _fits(self, index: int, limit: float) -> bool:
        own = self._at_most(self._table.num_prompt_tokens[index])
        return self._forecast.fits(index, self._step, own, self._lengths.outset(index), limit)

    def _add(self, index: int) -> None:
        row = self.num_running
        prompt = int(self._table.num_prompt_tokens[index])
        self._index[row], self._prompt[row] = index, prompt
        self._start[row] = self._computed[row] = min(int(self._planned_cached[index]), prompt - 1)
        self._output[row] = 0
        self.num_running += 1
        self._forecast.add(self._step, self._at_most(prompt), self._lengths.outset(index))
