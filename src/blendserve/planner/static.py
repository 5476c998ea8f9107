"""Policies that walk one order fixed beforehand and leave every step its full token budget: the baselines."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from blendserve.planner.base import Int64s, Proposal, SchedulerView, StepBudget
from blendserve.planner.tree import PrefixTree

BUCKET_PREFIX_RATIO = 0.33
"""Daft's default: a prompt joins the bucket of the one before it when they share this much of the prompt."""


class StaticPolicy:
    """Propose requests in a fixed order while a step's worth of tokens is not yet pending; the engine refuses what does
    not fit. Preempted requests come first again; what was admitted elsewhere (it runs already) is passed over."""

    def __init__(self, name: str, order: Int64s) -> None:
        self.name = name
        self._order = order
        self._position = 0
        self._has_left = np.zeros(len(order), dtype=np.bool_)
        self._num_waiting = len(order)
        self._preempted: list[int] = []
        self._proposed = -1

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def next(self, view: SchedulerView) -> Proposal | None:
        if not self._num_waiting:
            return None
        if self._proposed < 0:
            self._proposed = self._preempted[-1] if self._preempted else self._next_in_order()
        if view.num_running and view.num_pending_tokens.sum() >= view.max_num_batched_tokens:
            return None
        return Proposal(self._proposed)

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:  # noqa: ARG002
        index = proposal.index
        if self._preempted and self._preempted[-1] == index:
            self._preempted.pop()
        self._has_left[index] = True
        self._num_waiting -= 1
        self._proposed = -1

    def begin_step(self, view: SchedulerView, num_steps: int) -> StepBudget:  # noqa: ARG002
        return StepBudget(view.max_num_batched_tokens)

    def finished(self, index: int, num_output_tokens: int) -> None:
        pass

    def preempted(self, index: int, num_output_tokens: int) -> None:  # noqa: ARG002
        self._preempted.append(index)
        self._num_waiting += 1
        self._proposed = -1

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0

    def _next_in_order(self) -> int:
        while self._has_left[self._order[self._position]]:
            self._position += 1
        return int(self._order[self._position])


def fcfs_order(num_requests: int) -> Int64s:
    """The order of the input file."""
    return np.arange(num_requests, dtype=np.int64)


def random_order(num_requests: int, seed: int) -> Int64s:
    """NanoFlow-Balance: mixes the two resources by chance, and loses the sharing."""
    return np.random.default_rng(seed).permutation(num_requests).astype(np.int64)


def longest_first_order(expected_output_tokens: Int64s | np.ndarray[tuple[int], np.dtype[np.float64]]) -> Int64s:
    """Most expected output first, ties in file order."""
    return np.argsort(-np.asarray(expected_output_tokens), kind="stable").astype(np.int64)


def bucket_order(tree: PrefixTree) -> Int64s:
    """Sorted prompts cut into buckets where the shared prefix falls below a third of the prompt, largest buckets first.

    Source: Daft's dynamic prefix bucketing; the release of large buckets first is our reading of it.
    """
    if not tree.num_requests:
        return tree.order
    is_cut = tree.leaf_lcp < BUCKET_PREFIX_RATIO * tree.leaf_len
    is_cut[0] = True
    leaf_bucket = np.cumsum(is_cut) - 1
    bucket = np.repeat(leaf_bucket, tree.leaf_count)
    size = np.bincount(bucket)
    return tree.order[np.argsort(-size[bucket], kind="stable")]
