"""How many output tokens are still to come, as survival tables on a log grid: one row per stratum.

Row g, bin b covers lengths (edges[b], edges[b + 1]]. Survival S(n) = P(length > n) is linear inside a bin. Running
sequences are evidence too: they survived so far (censored data), without which early finishers, the short ones, would
make every estimate too short. Source: product-limit (Kaplan-Meier) estimate per bin, shrunk towards the parent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s

EDGE_RATIO = 1.1
SHRINKAGE_REQUESTS = 1.0
"""Evidence, in requests at risk, that the parent's hazard counts for in a bin, once scaled to the stratum's pace."""
MIN_PACE = 0.5
"""Few ends so far say that a stratum is slow, not how slow: what lies ahead is slowed by no more than this."""
PRIOR_REQUESTS = 0.5
PRIOR_SCALE_TOKENS = 256.0
"""With no evidence at all: P(length > n) = 1 / (1 + n / scale)^2, counted as half a request."""
_MAX_TABLED_TOKENS = 1 << 16


def make_edges(max_tokens: int) -> Int64s:
    """0, 1, 2, ... then steps of 10%, up to at least max_tokens."""
    edges = [0]
    while edges[-1] < max_tokens:
        edges.append(max(edges[-1] + 1, int(edges[-1] * EDGE_RATIO)))
    return np.array(edges if len(edges) > 1 else [0, 1], dtype=np.int64)


def hazards(events: Floats, at_risk: Floats, parent: Int64s, level: Int64s, edges: Int64s) -> Floats:
    """P(length in bin | beyond its start) from counts per stratum and bin; strata pass evidence up, trust down.

    Shapes: `events`, `at_risk` [num_strata, num_bins], a stratum's own requests only.
    """
    events, at_risk = events.copy(), at_risk.copy()
    strata_by_level = [np.flatnonzero(level == depth) for depth in range(int(level.max()) + 1)]
    for strata in reversed(strata_by_level[1:]):
        np.add.at(events, parent[strata], events[strata])
        np.add.at(at_risk, parent[strata], at_risk[strata])
    beyond = (1.0 + edges / PRIOR_SCALE_TOKENS) ** -2
    prior = 1.0 - beyond[1:] / beyond[:-1]
    hazard = np.empty_like(events)
    hazard[0] = (events[0] + PRIOR_REQUESTS * prior) / (at_risk[0] + PRIOR_REQUESTS)
    for strata in strata_by_level[1:]:
        trusted = hazard[parent[strata]]
        expected = (at_risk[strata] * trusted).sum(axis=1)
        pace = (events[strata].sum(axis=1) + SHRINKAGE_REQUESTS) / (expected + SHRINKAGE_REQUESTS)
        pull = SHRINKAGE_REQUESTS * np.minimum(trusted * np.maximum(pace, MIN_PACE)[:, None], 1.0)
        hazard[strata] = (events[strata] + pull) / (at_risk[strata] + SHRINKAGE_REQUESTS)
    return hazard


@dataclass(frozen=True, slots=True)
class SurvivalTable:
    """Shapes: `edges` int64[num_bins + 1]; at the edges, float64[num_strata, num_bins + 1]: `beyond`, survival;
    `first` and `second`, the moments E[min(length, edge)] and E[min(length, edge)^2]."""

    edges: Int64s
    beyond: Floats
    first: Floats
    second: Floats
    bin_of: Int64s

    @classmethod
    def from_hazards(cls, hazard: Floats, edges: Int64s) -> SurvivalTable:
        num_strata, num_bins = hazard.shape
        beyond = np.ones((num_strata, num_bins + 1))
        np.cumprod(1.0 - hazard, axis=1, out=beyond[:, 1:])
        np.maximum(beyond, 1e-12, out=beyond)
        width = np.diff(edges)
        per_token = (beyond[:, :-1] - beyond[:, 1:]) / width
        first, second = np.zeros_like(beyond), np.zeros_like(beyond)
        first_inside, second_inside = _moments_inside(edges[:-1], width, beyond[:, :-1], per_token)
        np.cumsum(first_inside, axis=1, out=first[:, 1:])
        np.cumsum(second_inside, axis=1, out=second[:, 1:])
        table = np.arange(min(int(edges[-1]), _MAX_TABLED_TOKENS))
        bin_of = np.searchsorted(edges, table, side="right") - 1
        return cls(edges, beyond, first, second, bin_of)

    def survival(self, strata: Int64s, lengths: Int64s) -> Floats:
        """P(length > n), aligned arrays (they broadcast)."""
        bins = self._bins(lengths)
        start, width = self.edges[bins], self.edges[bins + 1] - self.edges[bins]
        upper, lower = self.beyond[strata, bins], self.beyond[strata, bins + 1]
        inside = np.minimum((lengths - start) / width, 1.0)
        result: Floats = upper - (upper - lower) * inside
        return result

    def moments_below(self, strata: Int64s, lengths: Int64s) -> tuple[Floats, Floats]:
        """E[min(length, n)] and E[min(length, n)^2], aligned arrays."""
        bins = self._bins(lengths)
        start, width = self.edges[bins], self.edges[bins + 1] - self.edges[bins]
        upper, lower = self.beyond[strata, bins], self.beyond[strata, bins + 1]
        inside = np.minimum(lengths - start, width)
        first, second = _moments_inside(start, inside, upper, (upper - lower) / width)
        return self.first[strata, bins] + first, self.second[strata, bins] + second

    def quantile(self, strata: Int64s, survival: Floats) -> Floats:
        """The length that is exceeded with probability `survival`, aligned arrays."""
        low: Int64s = np.zeros(np.broadcast_shapes(strata.shape, survival.shape), dtype=np.int64)
        high: Int64s = np.full_like(low, len(self.edges) - 2)
        for _ in range(len(self.edges).bit_length()):
            middle = (low + high + 1) // 2
            is_beyond = self.beyond[strata, middle] > survival
            low = np.where(is_beyond, middle, low)
            high = np.where(is_beyond, high, np.maximum(middle - 1, low))
        upper, lower = self.beyond[strata, low], self.beyond[strata, low + 1]
        share: Floats = np.clip((upper - survival) / np.maximum(upper - lower, 1e-300), 0.0, 1.0)
        width = (self.edges[low + 1] - self.edges[low]).astype(np.float64)
        return self.edges[low] + share * width

    def _bins(self, lengths: Int64s) -> Int64s:
        if len(lengths) and int(lengths.max()) < len(self.bin_of):
            return self.bin_of[lengths]
        bins: Int64s = np.minimum(np.searchsorted(self.edges, lengths, side="right") - 1, len(self.edges) - 2)
        return bins


def _moments_inside(start: Int64s, count: Int64s, beyond: Floats, per_token: Floats) -> tuple[Floats, Floats]:
    """Sums of S(n) and (2 n + 1) S(n) over n = start .. start + count - 1, S falling by `per_token` from `beyond`."""
    pairs = count * (count - 1) / 2  # sum of x
    squares = pairs * (2 * count - 1) / 3  # sum of x^2
    first = count * beyond - per_token * pairs
    second = beyond * count * (2 * start + count) - per_token * ((2 * start + 1) * pairs + 2 * squares)
    return first, second
