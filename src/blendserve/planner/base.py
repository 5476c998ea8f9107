"""The seam between a policy (who enters next) and an engine (what runs): one protocol and the values that cross it.

A policy sees requests as rows of a `RequestTable` and the engine through a `SchedulerView`. It never sees tokens,
weights or the KV pool itself, so one policy drives the native engine, the simulator and remote servers.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RequestTable:
    """What is known of every request before it runs. Shapes: all [num_requests], tokens.

    `known_output_tokens` is -1 where the length must be estimated; `max_output_tokens` caps every estimate. `structure`
    numbers what answers must look like, 0 where they are free; None where all are.
    """

    num_prompt_tokens: Int64s
    max_output_tokens: Int64s
    known_output_tokens: Int64s
    structure: Int64s | None = None

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)


class EngineLimits(NamedTuple):
    """What an engine can hold. `capacity_tokens`: tokens that the whole KV pool holds. The other two limit a step."""

    capacity_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int


class SchedulerView(NamedTuple):
    """The engine's state between two steps; `scheduler_view` fills it.

    `free_tokens` counts the tokens of blocks that are free or may be evicted. The arrays are aligned, one entry per
    running sequence: int64[num_running]. They may borrow the engine's memory, so a view is valid until the engine
    admits, runs or removes a sequence. Policies cannot write to them.
    """

    capacity_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    free_tokens: int
    request_index: Int64s
    num_prompt_tokens: Int64s
    num_computed_tokens: Int64s
    num_output_tokens: Int64s

    @property
    def num_running(self) -> int:
        return len(self.request_index)

    @property
    def num_pending_tokens(self) -> Int64s:
        """Tokens that each running sequence has yet to compute before it decodes. Shape: [num_running]."""
        left = self.num_prompt_tokens + self.num_output_tokens - 1 - self.num_computed_tokens
        pending: Int64s = np.maximum(left, 0)
        return pending


def scheduler_view(limits: EngineLimits, free_tokens: int, columns: Int64s) -> SchedulerView:
    """The view of an engine. Shapes: `columns` int64[4, num_running]: request index, prompt, computed and output tokens
    of every running sequence."""
    if columns.flags.writeable:
        columns = columns.view()
        columns.flags.writeable = False
    return SchedulerView(*limits, free_tokens, *columns)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The request that a policy would admit now. `is_at_memory_end`: it comes from the memory end of the order."""

    index: int
    is_at_memory_end: bool = False


class StepBudget(NamedTuple):
    """What a step may hold beside its decodes: at most `num_prefill_tokens` tokens of prompts."""

    num_prefill_tokens: int


class Policy(Protocol):
    """An order of admission and a split of each step, alive while requests run.

    An engine admits in a round: it asks `next`, gives the request its memory, confirms with `admitted`, and asks again.
    `next` returns None to leave the KV memory as it is; until it is confirmed, it proposes the same request again.
    With nothing running and requests waiting it must propose one. `view` is always the engine's present state.

    `begin_step` ends the round: the engine runs a step with what it has admitted. It returns the budget of that step,
    and nothing else moves a policy's time. `num_steps` is 1, or the number of steps that a remote engine has run since
    the policy was last told.

    A preempted request waits again. A request that can never run is admitted and at once finished with 0 tokens, which
    says nothing of lengths. `next_use` ranks cached prefix blocks for eviction: larger means needed later, infinity
    means never again.
    """

    name: str

    @property
    def num_waiting(self) -> int: ...
    def next(self, view: SchedulerView) -> Proposal | None: ...
    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None: ...
    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget: ...
    def finished(self, index: int, num_output_tokens: int) -> None: ...
    def preempted(self, index: int, num_output_tokens: int) -> None: ...
    def next_use(self, key: Hashable) -> float: ...
