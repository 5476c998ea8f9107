"""Output lengths that are not known: sampled first, then estimated per subtree, corrected by all that finishes.

`LengthModel` keeps a distribution per stratum (ours); `MeanLengthModel` one mean of the sampled requests (the paper's,
section 5.1). Exact hints and caps of the request table hold in both.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.strata import choose_samples, find_strata, split_by, split_by_prompt
from blendserve.planner.survival import SurvivalTable, hazards, make_edges
from blendserve.planner.tree import PrefixTree

DEFAULT_SAMPLE_RATE = 0.01
NUM_QUANTILES = 4
_LEVELS = 1.0 - (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES  # survival at the middles of equal shares
_NO_RUNNING = np.zeros(0, dtype=np.int64)


class Lengths(Protocol):
    """Expected output tokens of requests, by index. `samples` are to be served first."""

    samples: Int64s

    def estimate(self, indices: Int64s) -> Floats: ...
    def remaining(self, indices: Int64s, num_output_tokens: Int64s) -> Floats: ...
    def moments(self, indices: Int64s, num_output_tokens: Int64s) -> tuple[Floats, Floats]: ...
    def quantiles(self, indices: Int64s, num_output_tokens: Int64s) -> Floats: ...
    def outset(self, index: int) -> Floats: ...
    def longest_unknown(self, indices: Int64s) -> float: ...
    def observe(self, index: int, num_output_tokens: int) -> None: ...
    @property
    def num_observed(self) -> int: ...
    def refresh(self, running: Int64s = ..., num_output_tokens: Int64s = ...) -> None: ...


class LengthModel:
    """A survival table per large subtree, and in it per order of magnitude of prompts, from finished and running
    requests, each shrunk towards its parent's.

    Estimates change in `refresh` only, so values read between two refreshes agree with each other.
    """

    def __init__(
        self, tree: PrefixTree, table: RequestTable, *, sample_rate: float = DEFAULT_SAMPLE_RATE, seed: int = 0
    ) -> None:
        strata = find_strata(tree)
        if table.structure is not None:
            strata = split_by(strata, table.structure)
        self.strata = split_by_prompt(strata, table.num_prompt_tokens)
        self._known = table.known_output_tokens
        self._cap = np.where(self._known >= 0, self._known, np.maximum(table.max_output_tokens, 1))
        self.samples = choose_samples(tree, self.strata, self._known < 0, rate=sample_rate, seed=seed)
        is_unknown = self._known < 0
        self._edges = make_edges(int(self._cap[is_unknown].max()) if is_unknown.any() else 1)
        shape = (len(self.strata), len(self._edges) - 1)
        self._events, self._censored, self._unseen = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._buffer: list[tuple[int, int]] = []
        self._num_observed = 0
        self.refresh()

    @property
    def num_observed(self) -> int:
        return self._num_observed

    def observe(self, index: int, num_output_tokens: int) -> None:
        """A request has finished; one that reached its cap only tells that its length is at least that, and one that
        was refused (0 tokens) nothing.
        """
        if self._known[index] < 0 and num_output_tokens > 0:
            self._buffer.append((index, num_output_tokens))
            self._num_observed += 1

    def refresh(self, running: Int64s = _NO_RUNNING, num_output_tokens: Int64s = _NO_RUNNING) -> None:
        """Take in what was observed, and how far running requests (aligned arrays) have come. Mutates: estimates."""
        if self._buffer:
            finished = np.array(self._buffer, dtype=np.int64)
            self._buffer.clear()
            index, length = finished[:, 0], np.minimum(finished[:, 1], self._edges[-1])
            bins = np.maximum(np.searchsorted(self._edges, length, side="left") - 1, 0)
            is_capped = length >= self._cap[index]
            strata = self.strata.stratum_of[index]
            np.add.at(self._events, (strata[~is_capped], bins[~is_capped]), 1.0)
            self._add_censored(self._censored, self._unseen, strata[is_capped], length[is_capped])
        censored, unseen = self._censored, self._unseen
        is_unknown = self._known[running] < 0
        if is_unknown.any():
            censored, unseen = censored.copy(), unseen.copy()
            strata = self.strata.stratum_of[running[is_unknown]]
            self._add_censored(censored, unseen, strata, num_output_tokens[is_unknown])
        passed = np.cumsum((self._events + censored)[:, ::-1], axis=1)[:, ::-1]
        hazard = hazards(self._events, passed - unseen, self.strata.parent, self.strata.level, self._edges)
        self._table = SurvivalTable.from_hazards(hazard, self._edges)
        every = np.arange(len(self.strata))[:, None]
        self._outset = np.maximum(
            self._table.quantile(every, np.broadcast_to(_LEVELS, (len(every), NUM_QUANTILES))), 1.0
        )

    def estimate(self, indices: Int64s) -> Floats:
        """Expected output tokens of requests that have not started."""
        return self.remaining(indices, np.zeros(len(indices), dtype=np.int64))

    def remaining(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """Expected output tokens still to come, given how many there are: at least 1 where any can come."""
        return self.moments(indices, num_output_tokens)[0]

    def moments(self, indices: Int64s, num_output_tokens: Int64s) -> tuple[Floats, Floats]:
        """Expectations of the output tokens still to come and of their square: KV reads grow with the square."""
        cap = self._cap[indices]
        first = np.maximum(cap - num_output_tokens, 0).astype(np.float64)
        second = first * first
        is_open = (self._known[indices] < 0) & (first > 0)
        if is_open.any():
            rows, done, limit = self.strata.stratum_of[indices[is_open]], num_output_tokens[is_open], cap[is_open]
            low, low_squared = self._table.moments_below(rows, done)
            high, high_squared = self._table.moments_below(rows, limit)
            survival = self._table.survival(rows, done)
            left = np.clip((high - low) / survival, 1.0, first[is_open])
            squared = (high_squared - low_squared) / survival - 2 * done * left
            second[is_open] = np.clip(squared, left * left, second[is_open])
            first[is_open] = left
        return first, second

    def quantiles(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """Output tokens still to come at the middles of equal shares of probability.

        Shapes: [len(indices), NUM_QUANTILES], rising along a row.
        """
        left = np.maximum(self._cap[indices] - num_output_tokens, 0).astype(np.float64)[:, None]
        result = np.repeat(left, NUM_QUANTILES, axis=1)
        is_open = (self._known[indices] < 0) & (left[:, 0] > 0)
        if is_open.any():
            rows, done = self.strata.stratum_of[indices[is_open]], num_output_tokens[is_open]
            level = self._table.survival(rows, done)[:, None] * _LEVELS
            length = self._table.quantile(rows[:, None], level) - done[:, None]
            result[is_open] = np.clip(length, 1.0, left[is_open])
        return result

    def outset(self, index: int) -> Floats:
        """Output tokens of one request that has not started: equally likely lengths, rising; one where it is known."""
        cap = self._cap[index : index + 1]
        if self._known[index] >= 0:
            return cap.astype(np.float64)
        lengths: Floats = np.minimum(self._outset[self.strata.stratum_of[index]], cap)
        return lengths

    def longest_unknown(self, indices: Int64s) -> float:
        """What the longest output of those whose length is not known is expected to be, about; 0 where all are known.

        Of n requests of a stratum it is the length that one in n + 1 exceeds.
        """
        unknown = indices[self._known[indices] < 0]
        if not len(unknown):
            return 0.0
        counts = np.bincount(self.strata.stratum_of[unknown], minlength=len(self.strata))
        strata = np.flatnonzero(counts)
        exceeding: Floats = 1.0 / (1.0 + counts[strata].astype(np.float64))
        longest = float(self._table.quantile(strata, exceeding).max())
        return min(longest, float(self._cap[unknown].max()))

    def _add_censored(self, censored: Floats, unseen: Floats, strata: Int64s, lengths: Int64s) -> None:
        """Count requests known to be longer than `lengths`: at risk in the bins before, and in part of the bin there.

        Mutates: `censored` counts them in the bin that holds the length, `unseen` the part of that bin still ahead.
        """
        bins = np.minimum(np.searchsorted(self._edges, lengths, side="right") - 1, censored.shape[1] - 1)
        width = self._edges[bins + 1] - self._edges[bins]
        np.add.at(censored, (strata, bins), 1.0)
        np.add.at(unseen, (strata, bins), 1.0 - np.minimum((lengths - self._edges[bins]) / width, 1.0))


class MeanLengthModel:
    """The paper's: every subtree has the mean of its sampled requests, or of the nearest ancestor that has some.

    Deviation: subtrees are the large ones that `LengthModel` uses; before any sample has finished, the caps stand.
    """

    def __init__(
        self, tree: PrefixTree, table: RequestTable, *, sample_rate: float = DEFAULT_SAMPLE_RATE, seed: int = 0
    ) -> None:
        self.strata = find_strata(tree)
        self._known = table.known_output_tokens
        self._cap = np.where(self._known >= 0, self._known, np.maximum(table.max_output_tokens, 1))
        self.samples = choose_samples(tree, self.strata, self._known < 0, rate=sample_rate, seed=seed)
        self._waited_for = set(self.samples.tolist())
        self._sum, self._count = np.zeros(len(self.strata)), np.zeros(len(self.strata))
        self._num_observed = 0
        self.refresh()

    @property
    def num_observed(self) -> int:
        return self._num_observed

    def observe(self, index: int, num_output_tokens: int) -> None:
        """A request has finished; only sampled ones count, unless they were refused (0 tokens)."""
        if index in self._waited_for:
            self._waited_for.discard(index)
            if not num_output_tokens:
                return
            self._sum[self.strata.stratum_of[index]] += num_output_tokens
            self._count[self.strata.stratum_of[index]] += 1
            self._num_observed += 1

    def refresh(self, running: Int64s = _NO_RUNNING, num_output_tokens: Int64s = _NO_RUNNING) -> None:  # noqa: ARG002
        """Take in the sampled requests that have finished. Mutates: estimates."""
        total, count = self._sum.copy(), self._count.copy()
        for stratum in range(len(self.strata) - 1, 0, -1):
            above = self.strata.parent[stratum]
            total[above] += total[stratum]
            count[above] += count[stratum]
        mean = np.divide(total, count, out=np.full(len(count), np.inf), where=count > 0)
        for stratum in range(1, len(self.strata)):
            if not count[stratum]:
                mean[stratum] = mean[self.strata.parent[stratum]]
        self._mean = mean

    def estimate(self, indices: Int64s) -> Floats:
        """Expected output tokens of requests that have not started."""
        cap = self._cap[indices].astype(np.float64)
        return np.where(self._known[indices] >= 0, cap, np.minimum(self._mean[self.strata.stratum_of[indices]], cap))

    def remaining(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """What is left of the estimate, at least 1 where any can come."""
        left = np.maximum(self.estimate(indices) - num_output_tokens, 1.0)
        return np.minimum(left, np.maximum(self._cap[indices] - num_output_tokens, 0))

    def moments(self, indices: Int64s, num_output_tokens: Int64s) -> tuple[Floats, Floats]:
        """The estimate and its square: a mean knows no spread."""
        left = self.remaining(indices, num_output_tokens)
        return left, left * left

    def quantiles(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """The estimate at every level. Shapes: [len(indices), NUM_QUANTILES]."""
        return np.repeat(self.remaining(indices, num_output_tokens)[:, None], NUM_QUANTILES, axis=1)

    def outset(self, index: int) -> Floats:
        """The estimate of one request."""
        return self.estimate(np.array([index]))

    def longest_unknown(self, indices: Int64s) -> float:
        """The largest estimate among those whose length is not known."""
        unknown = indices[self._known[indices] < 0]
        return float(self.estimate(unknown).max(initial=0.0))
