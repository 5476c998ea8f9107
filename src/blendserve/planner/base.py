"""The seam between a policy (who enters next) and an engine (what runs): two protocols, no behaviour.

A policy sees requests as rows of a `RequestTable` and the engine through a `SchedulerView`; it never sees
tokens, weights or the KV pool itself, so one policy drives the native engine, the simulator and remote servers.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RequestTable:
    """What is known of every request before it runs. Shapes: all [num_requests], tokens.

    `known_output_tokens` is -1 where the length must be estimated; `max_output_tokens` caps every estimate.
    """

    num_prompt_tokens: Int64s
    max_output_tokens: Int64s
    known_output_tokens: Int64s

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)


class SchedulerView(Protocol):
    """The engine's state as a policy may read it, between two steps. Arrays are aligned, one entry per running
    sequence, valid until the next step and never to be written.
    """

    @property
    def capacity_tokens(self) -> int: ...  # tokens that the whole KV pool holds
    @property
    def free_tokens(self) -> int: ...  # tokens in blocks that are free or may be evicted
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def request_index(self) -> Int64s: ...
    @property
    def num_prompt_tokens(self) -> Int64s: ...
    @property
    def num_computed_tokens(self) -> Int64s: ...
    @property
    def num_output_tokens(self) -> Int64s: ...


class Policy(Protocol):
    """An order of admission and a split of each step, alive while requests run.

    `next` proposes the request to admit now, or None to leave the KV memory as it is; it proposes the same one
    until `admitted` confirms it. With nothing running and requests waiting it must propose one. A preempted
    request waits again. One that can never run is admitted and at once finished with 0 tokens, which says nothing of
    lengths. `prefill_tokens` is the most prefill tokens the coming step may hold beside its decodes.
    `next_use` ranks cached prefix blocks for eviction: larger means needed later, infinity means never again.
    """

    name: str

    @property
    def num_waiting(self) -> int: ...
    def next(self, view: SchedulerView) -> int | None: ...
    def prefill_tokens(self, view: SchedulerView) -> int: ...
    def admitted(self, index: int, num_cached_tokens: int) -> None: ...
    def finished(self, index: int, num_output_tokens: int) -> None: ...
    def preempted(self, index: int, num_output_tokens: int) -> None: ...
    def next_use(self, key: Hashable) -> float: ...
