"""The requests inside vLLM as a policy may see them from outside, and who joins them next.

vLLM tells how full its KV memory is and who has ended. How far the others are follows from its way of filling a step:
every decode first, then prompts in the order of their admission up to the token budget.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.engines.estimates import planned_cached_tokens
from blendserve.engines.vllm.api import VllmLimits
from blendserve.planner.base import EngineLimits, Int64s, Policy, SchedulerView, scheduler_view
from blendserve.planner.forecast import KvForecast
from blendserve.planner.learner import Refresher
from blendserve.planner.plan import Plan


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

    Rows are in the order of admission.
    """

    def __init__(self, plan: Plan, policy: Policy, limits: VllmLimits, max_inflight: int) -> None:
        self._policy = policy
        self._table = plan.table
        self._planned_cached = planned_cached_tokens(plan.tree) // limits.block_size * limits.block_size
        self._lengths = plan.new_lengths()
        self._refresher = Refresher(self._lengths)
        self._forecast = KvForecast()
        self._step = 0
        self._block_size = limits.block_size
        self.capacity_tokens = limits.capacity_tokens
        self._limits = EngineLimits(limits.capacity_tokens, max_inflight, limits.max_num_batched_tokens)
        self._used_tokens = 0
        self.num_running = 0
        shape = max_inflight
        self._index = np.zeros(shape, np.int64)
        self._prompt = np.zeros(shape, np.int64)
        self._cached = np.zeros(shape, np.int64)
        self._has_run = np.zeros(shape, np.bool_)
        self._computed = np.zeros(shape, np.int64)
        self._output = np.zeros(shape, np.int64)

    def view(self) -> SchedulerView:
        """What a policy may see now."""
        columns = (self.request_index, self.num_prompt_tokens, self.num_computed_tokens, self.num_output_tokens)
        return scheduler_view(self._limits, self.free_tokens, np.stack(columns))

    @property
    def free_tokens(self) -> int:
        """Tokens that are neither in use nor about to be."""
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
    def _has_run_now(self) -> NDArray[np.bool_]:
        return self._has_run[: self.num_running]

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
        while self.num_running < self._limits.max_num_seqs:
            proposal = self._policy.next(self.view())
            if proposal is None or (self.num_running and not self._fits(proposal.index, limit)):
                break
            self._policy.admitted(proposal, int(self._planned_cached[proposal.index]))
            self._add(proposal.index)
            admitted.append(proposal.index)
        self._policy.begin_step(self.view(), num_steps=1)
        return admitted

    def adopt(self, indices: list[int]) -> None:
        """Take over requests that the policy has admitted already."""
        for index in indices:
            self._add(index)

    def advance(self, num_hit_tokens: int) -> StepLoad:
        """A step has run, in which vLLM found so many prompt tokens in its prefix cache: move everyone on."""
        self._step += 1
        self._begin_prompts(num_hit_tokens)
        computed, output = self.num_computed_tokens, self.num_output_tokens
        left = np.where(self._has_run_now, self.num_prompt_tokens + output - computed, 0)
        is_decoding = (output > 0) & (left == 1)
        num_decodes = int(np.count_nonzero(is_decoding))
        to_prefill = np.where(is_decoding, 0, left)
        before = np.cumsum(to_prefill) - to_prefill
        chunk = np.clip(max(0, self._limits.max_num_batched_tokens - num_decodes) - before, 0, to_prefill)
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

    def _begin_prompts(self, num_hit_tokens: int) -> None:
        """Whom the rest of the step's tokens reaches, each from behind what was found of its prefix. vLLM tells the sum
        of that alone, so those with a planned prefix are taken to have it, and what is left over goes to the first.
        """
        left = (self.num_prompt_tokens + self.num_output_tokens - self.num_computed_tokens)[self._has_run_now]
        budget = self._limits.max_num_batched_tokens - int(left.sum())
        hits = num_hit_tokens
        begun = []
        for row in np.flatnonzero(~self._has_run_now):
            if budget <= 0:
                break
            self._computed[row] = min(int(self._cached[row]), hits)
            hits -= int(self._computed[row])
            budget -= int(self._prompt[row] + self._output[row] - self._computed[row])
            begun.append(row)
        for row in begun:
            more = min(hits, int((self._prompt[row] - 1) // self._block_size * self._block_size - self._computed[row]))
            self._computed[row] += more
            hits -= more
        self._has_run[begun] = True

    def preempt(self, count: int) -> None:
        """vLLM has taken the memory of so many requests, as it does from the youngest: they compute it all again."""
        (has_run,) = np.nonzero(self._has_run_now)
        rows = has_run[len(has_run) - min(count, len(has_run)) :]
        self._computed[rows] = self._cached[rows] = 0
        self._has_run[rows] = False

    def finish(self, index: int, num_output_tokens: int) -> None:
        """A request has ended; 0 tokens where it was refused."""
        (rows,) = np.nonzero(self.request_index == index)
        row = int(rows[0])
        last = self.num_running - 1
        for column in (self._index, self._prompt, self._cached, self._has_run, self._computed, self._output):
            column[row:last] = column[row + 1 : last + 1]
        self.num_running = last
        self._policy.finished(index, num_output_tokens)
        self._lengths.observe(index, num_output_tokens)

    def start_over(self) -> list[int]:
        """Every request inside is to be computed again, in this order: the engine that had them is gone."""
        self._used_tokens = 0
        self._computed[: self.num_running] = 0
        self._cached[: self.num_running] = 0
        self._has_run[: self.num_running] = False
        self._output[: self.num_running] = 0
        return [int(index) for index in self.request_index]

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.num_running <= self._limits.max_num_seqs
        assert len(set(self.request_index.tolist())) == self.num_running
        assert (self.num_computed_tokens >= 0).all()
        assert (self.num_computed_tokens < self.num_prompt_tokens + np.maximum(self.num_output_tokens, 1)).all()

    def _num_pending_tokens(self) -> int:
        """Tokens of prompts that have yet to take their memory: of those that have not run, all, for what is planned to
        be shared may not be there yet.
        """
        total, computed = self.num_prompt_tokens + self.num_output_tokens, self.num_computed_tokens
        return int(np.where(self._has_run_now, np.maximum(total - computed - 1, 0), total).sum())

    def _look_ahead(self) -> float:
        """Forecast from scratch, as if nothing were shared; returns the limit for that. What sharing spares now is
        taken to stay.
        """
        running, outputs = self.request_index, self.num_output_tokens
        if self._refresher.is_due:
            self._refresher.refresh(self.view())
        own = self.num_prompt_tokens + outputs
        self._forecast.rebuild(self._step, self._at_most(own), self._lengths.quantiles(running, outputs))
        spared = int(self.num_computed_tokens[self._has_run_now].sum()) - self._used_tokens
        return self.capacity_tokens + max(0, spared)

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
        self._cached[row] = self._computed[row] = min(int(self._planned_cached[index]), prompt - 1)
        self._has_run[row] = False
        self._output[row] = 0
        self.num_running += 1
        self._forecast.add(self._step, self._at_most(prompt), self._lengths.outset(index))
