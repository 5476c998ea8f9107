"""Random work for the engine loop: requests with shared prefixes, and a policy that knows and does anything it may."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from blendserve.config import EngineConfig
from blendserve.engine.fake import FakeExecutor
from blendserve.engine.keys import block_keys
from blendserve.engine.loop import EngineLoop
from blendserve.planner.base import Policy, Proposal, SchedulerView, StepBudget
from blendserve.request import Request, SamplingParams, SequenceOutput

BLOCK_SIZE = 4
VOCAB_SIZE = 30
EOS = (7,)


def make_request(
    index: int,
    tokens: Iterable[int],
    max_output_tokens: int,
    sampling: SamplingParams | None = None,
    seed: int | None = None,
) -> Request:
    """A request over BLOCK_SIZE-token blocks whose seed is its index unless told otherwise."""
    prompt = np.array(list(tokens), np.int32)
    return Request(
        index,
        prompt,
        len(prompt),
        sampling or SamplingParams(),
        max_output_tokens,
        seed=index if seed is None else seed,
        block_keys=block_keys(prompt, BLOCK_SIZE),
    )


def make_loop(executor: FakeExecutor, max_num_seqs: int = 8, max_num_batched_tokens: int = 16) -> EngineLoop:
    return EngineLoop(
        executor,
        EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        clock=lambda: 0.0,
    )


class PlannedPolicy:
    """Admits in a given order, with random prefill budgets and pauses, and knows the next use of every key."""

    name = "planned"

    def __init__(
        self, requests: Sequence[Request], order: Sequence[int], seed: int = 0, budgets: Sequence[int] = (64,)
    ):
        self._random = random.Random(seed)
        self._budgets = budgets
        self._waiting = list(order)
        self._requests = requests
        self.log: list[tuple[str, int]] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next(self, view: SchedulerView) -> Proposal | None:
        if not self._waiting or (view.num_running and self._random.random() < 0.1):
            return None
        return Proposal(self._waiting[0])

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:  # noqa: ARG002
        assert self._waiting.pop(0) == proposal.index
        self.log.append(("admitted", proposal.index))

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:  # noqa: ARG002
        return StepBudget(self._random.choice(self._budgets))

    def finished(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self.log.append(("finished", index))

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._waiting.insert(self._random.randrange(len(self._waiting) + 1), index)
        self.log.append(("preempted", index))

    def next_use(self, key: Hashable) -> float:
        for position, index in enumerate(self._waiting):
            if key in self._requests[index].block_keys:
                return position
        return float("inf")


def run_checked(
    loop: EngineLoop, requests: Sequence[Request], policy: Policy, max_steps: int = 20_000, preempt_every: int = 0
) -> dict[int, SequenceOutput]:
    """Run to the end with `check()` after every step; each `preempt_every`-th step begins with a forced preemption."""
    outputs: dict[int, SequenceOutput] = {}
    chooser = random.Random(len(requests))
    loop.begin(requests, policy)
    while loop.has_work:
        num_running = loop.batcher.table.num_running
        if preempt_every and loop.stats.num_steps % preempt_every == preempt_every - 1 and num_running > 1:
            loop.preempt(chooser.randrange(num_running))
            loop.check()
        for output in loop.step():
            assert output.index not in outputs, "a request ended twice"
            outputs[output.index] = output
        loop.check()
        assert loop.stats.num_steps < max_steps, "the run does not end"
    loop.end()
    loop.check()
    assert loop.batcher.pool.num_free == loop.batcher.pool.num_blocks, "blocks are left"
    return outputs
