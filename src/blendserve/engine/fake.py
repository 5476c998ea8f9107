"""Executors and policies that need no model, shipped so that every part of the engine can be tested and timed."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from blendserve.engine.step import NO_PROMPT_RESULT, Int32s, PromptResult, StepPlan, StepResult
from blendserve.errors import ExecutorError
from blendserve.planner.base import Proposal, SchedulerView, StepBudget
from blendserve.request import Request, TokenIds, TokenLogprob

_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """A bijection on 64 bits that spreads every input bit (the finaliser of SplitMix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _cell(token: int, position: int) -> int:
    return _mix((token + 1) * _MULTIPLIER + position & _MASK)


def _sample(prefix: int, position: int, seed: int, vocab_size: int) -> int:
    return _mix(prefix ^ _mix(seed + position)) % vocab_size


def expected_tokens(request: Request, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> list[int]:
    """The dumb twin: the output tokens of one request, generated alone and token by token, without any KV memory."""
    token_ids = request.prompt_token_ids.tolist()
    output: list[int] = []
    sampling = request.sampling
    while len(output) < request.max_output_tokens:
        prefix = 0
        for position, token in enumerate(token_ids + output):
            prefix ^= _cell(token, position)
        output.append(_sample(prefix, len(token_ids) + len(output), request.seed, vocab_size))
        is_eos = output[-1] in eos_token_ids and not sampling.ignore_eos
        if len(output) >= sampling.min_tokens and (is_eos or output[-1] in sampling.stop_token_ids):
            break
    return output


def fake_logprob(prefix: int, token: int) -> float:
    return -float(_mix(prefix ^ token) % 10_000)


def expected_prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...]:
    """What `FakeExecutor` must say of a prompt, from its tokens alone."""
    prefix, found = 0, []
    for position, token in enumerate(request.prompt_token_ids.tolist()):
        found.append(TokenLogprob(token, fake_logprob(prefix, token)))
        prefix ^= _cell(token, position)
    return (None, *found[1:])


class FakeExecutor:
    """Generates tokens that depend on every token before them, read back from its KV blocks: a wrong block table, a
    block read too early, shared wrongly or evicted in use changes the output. Time is virtual: `step_s` a step plus
    `token_s` a token. Raises ExecutorError at step `fails_at_step`.

    Shapes: `kv` uint64[num_blocks, block_size].
    """

    needs_tokens = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 4,
        vocab_size: int = 1000,
        eos_token_ids: tuple[int, ...] = (),
        step_s: float = 1.0,
        token_s: float = 0.01,
        fails_at_step: int = -1,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.step_s = step_s
        self.token_s = token_s
        self.fails_at_step = fails_at_step
        self.scores: NDArray[np.float64] = np.full((num_blocks, block_size), np.nan)
        self._prefix_by_block: dict[int, int] = {}
        self._has_run: set[int] = set()
        self.kv: NDArray[np.uint64] = np.zeros((num_blocks, block_size), np.uint64)
        self.plans: list[tuple[tuple[int, int, int], ...]] = []
        self.request_by_slot: dict[int, Request] = {}
        self.is_closed = False

    def admit(self, slot: int, request: Request) -> None:
        assert slot not in self.request_by_slot, "the slot is taken"
        self.request_by_slot[slot] = request

    def release(self, slot: int) -> None:
        del self.request_by_slot[slot]
        self._has_run.discard(slot)

    def kept_with(self, request: Request) -> Hashable | None:
        return None if request.sampling.prompt_logprobs is None else ("logprobs", request.sampling.prompt_logprobs)

    def prompt_result(self, slot: int, blocks: NDArray[np.int32]) -> PromptResult:
        """Log probabilities that name all tokens before each, as they were kept with its block."""
        token_ids = self.request_by_slot[slot].prompt_token_ids.tolist()
        size = self.block_size
        kept = [self.scores[blocks[at // size], at % size] for at in range(len(token_ids))]
        scored = [TokenLogprob(token, float(score)) for token, score in zip(token_ids, kept, strict=True)]
        return PromptResult((None, *scored[1:]))

    def close(self) -> None:
        self.is_closed = True

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the entries one after the other, and log each as (request index, first position, tokens)."""
        if len(self.plans) == self.fails_at_step:
            raise ExecutorError(f"step {self.fails_at_step} fails on purpose; set fails_at_step to -1")
        entries = list(
            zip(plan.slots.tolist(), plan.num_computed_tokens.tolist(), plan.num_scheduled_tokens.tolist(), strict=True)
        )
        self.plans.append(tuple((self.request_by_slot[slot].index, begin, count) for slot, begin, count in entries))
        sampled: list[int] = []
        logprobs: dict[int, TokenLogprob] = {}
        for (slot, begin, count), is_sampled in zip(entries, plan.is_sampled.tolist(), strict=True):
            prefix = self._run_entry(plan, slot, begin, begin + count)
            if is_sampled:
                request = self.request_by_slot[slot]
                token = _sample(prefix, begin + count, request.seed, self.vocab_size)
                if request.sampling.logprobs is not None:
                    logprobs[len(sampled)] = TokenLogprob(token, -float(begin + count))
                sampled.append(token)
        elapsed_s = self.step_s + self.token_s * int(plan.num_scheduled_tokens.sum())
        return StepResult(np.array(sampled, np.int32), elapsed_s, logprobs)

    def _run_entry(self, plan: StepPlan, slot: int, begin: int, end: int) -> int:
        """Write the cells of positions [begin, end) and return what attention over [0, end) reads."""
        positions = np.arange(end)
        blocks = plan.block_tables[slot, positions // self.block_size]
        offsets = positions % self.block_size
        tokens: TokenIds = plan.token_ids[slot, begin:end]
        cells = [_cell(token, begin + i) for i, token in enumerate(tokens.tolist())]
        self.kv[blocks[begin:], offsets[begin:]] = np.array(cells, np.uint64)
        if self.request_by_slot[slot].sampling.prompt_logprobs is not None:
            self._score(plan, slot, begin, end)
        return int(np.bitwise_xor.reduce(self.kv[blocks, offsets]))

    def _score(self, plan: StepPlan, slot: int, begin: int, end: int) -> None:
        """Score what tokens [begin, end) foretell, and the first after a prefix hit by what its block kept."""
        size, table = self.block_size, plan.block_tables[slot]
        num_prompt_tokens = self.request_by_slot[slot].num_prompt_tokens
        for position in range(begin - (slot not in self._has_run and begin > 0), min(end, num_prompt_tokens)):
            cells = self.kv[table[np.arange(position + 1) // size], np.arange(position + 1) % size]
            is_hit = position < begin
            prefix = (
                self._prefix_by_block[int(table[position // size])] if is_hit else int(np.bitwise_xor.reduce(cells))
            )
            if position % size == size - 1 and not is_hit:
                self._prefix_by_block[int(table[position // size])] = prefix
            if position + 1 < num_prompt_tokens:
                token = int(plan.token_ids[slot, position + 1])
                self.scores[table[(position + 1) // size], (position + 1) % size] = fake_logprob(prefix, token)
        self._has_run.add(slot)


class FakeSimulator:
    """An executor without tokens: every step takes `step_s` plus `token_s` a token of virtual time."""

    needs_tokens = False
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, num_blocks: int, block_size: int = 16, step_s: float = 0.01, token_s: float = 1e-5) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.step_s = step_s
        self.token_s = token_s
        self._zeros = np.zeros(0, np.int32)

    def admit(self, slot: int, request: Request) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def kept_with(self, request: Request) -> Hashable | None:  # noqa: ARG002
        return None

    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult:  # noqa: ARG002
        return NO_PROMPT_RESULT

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        num_sampled = len(plan.slots) if not plan.num_prefill_tokens else int(np.count_nonzero(plan.is_sampled))
        if num_sampled > len(self._zeros):
            self._zeros = np.zeros(2 * num_sampled, np.int32)
        elapsed_s = self.step_s + self.token_s * (plan.num_prefill_tokens + plan.num_decode_tokens)
        return StepResult(self._zeros[:num_sampled], elapsed_s, {})


class FifoPolicy:
    """First come, first served, whole token budget for prefill, no idea of the future. Preempted requests go first."""

    name = "fifo"

    def __init__(self, num_requests: int) -> None:
        self._waiting = deque(range(num_requests))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next(self, view: SchedulerView) -> Proposal | None:  # noqa: ARG002
        return Proposal(self._waiting[0]) if self._waiting else None

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:  # noqa: ARG002
        assert self._waiting.popleft() == proposal.index

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:  # noqa: ARG002
        return StepBudget(view.max_num_batched_tokens)

    def finished(self, index: int, num_output_tokens: int) -> None:
        pass

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._waiting.appendleft(index)

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0
