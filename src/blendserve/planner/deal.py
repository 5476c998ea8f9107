"""Pieces of a job dealt to replicas so that all end at the same time, the longest requests considered.

Long requests go to as few parts as their memory traffic allows: the first part gets the longest, the next the longest
of the rest. So one part alone takes the many steps that the longest request needs. Dealt one to each part, they would
make every part take about as many.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s
from blendserve.planner.part_time import NUM_STRETCHES, PartEngine

Bools = NDArray[np.bool_]
LOADS = (0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
"""Shares of an even part's memory traffic up to which a part may be filled with long requests. All are tried."""
_NUM_HALVINGS = 20
_GOLDEN = 0.6180339887498949


class Pieces(NamedTuple):
    """Runs of requests that stay together. Shapes: float64[num_pieces]; `longest_tokens`: most output tokens of one
    request. Units: seconds, tokens."""

    compute_s: Floats
    memory_s: Floats
    longest_tokens: Floats

    def at(self, piece: int) -> tuple[float, float, float]:
        return float(self.compute_s[piece]), float(self.memory_s[piece]), float(self.longest_tokens[piece])


class _Loads:
    """What the parts have so far."""

    def __init__(self, num_parts: int, engine: PartEngine) -> None:
        self.engine = engine
        self.compute_s, self.memory_s, self.longest = np.zeros(num_parts), np.zeros(num_parts), np.zeros(num_parts)
        self.reads_s = np.zeros((num_parts, NUM_STRETCHES))

    def time_with(self, compute_s: Floats | float, memory_s: Floats | float, longest: float = 0.0) -> Floats:
        return self.engine.time_s(
            self.compute_s + compute_s, self.memory_s + memory_s, self.longest.clip(longest), self.reads_s
        )

    def add(self, part: int, compute_s: float, memory_s: float, longest: float) -> None:
        self.compute_s[part] += compute_s
        self.memory_s[part] += memory_s
        self.longest[part] = max(self.longest[part], longest)


def deal_evenly_in_time(pieces: Pieces, num_parts: int, engine: PartEngine, is_small: Bools) -> Int64s:
    """A part for every piece: the division with the earliest end. `is_small` bool[num_pieces]: too small to look at
    each."""
    is_long = pieces.longest_tokens > float(pieces.memory_s.sum()) / engine.full_s / num_parts
    long = np.flatnonzero(is_long)
    long = long[np.argsort(-pieces.longest_tokens[long], kind="stable")]
    ways = {tuple(_filled(pieces, long, num_parts, load)) for load in LOADS}
    tried = [_deal(pieces, num_parts, engine, long, np.array(way, dtype=np.int64), is_small) for way in sorted(ways)]
    return min(tried, key=lambda one: one[0])[1]


def _filled(pieces: Pieces, long: Int64s, num_parts: int, load: float) -> list[int]:
    """Parts of the long pieces, the longest first, where a part is full at `load` of an even part's memory traffic."""
    room_s = load * float(pieces.memory_s.sum()) / num_parts
    parts: list[int] = []
    filled, held_s = 0, 0.0
    for memory_s in pieces.memory_s[long].tolist():
        if held_s and held_s + memory_s > room_s and filled < num_parts - 1:
            filled, held_s = filled + 1, 0.0
        held_s += memory_s
        parts.append(filled)
    return parts


def _deal(
    pieces: Pieces, num_parts: int, engine: PartEngine, long: Int64s, part_of_long: Int64s, is_small: Bools
) -> tuple[float, Int64s]:
    """When the last part ends, and a part for every piece."""
    part = np.full(len(pieces.compute_s), -1, dtype=np.int64)
    part[long] = part_of_long
    loads = _Loads(num_parts, engine)
    for piece in long.tolist():
        loads.add(int(part[piece]), *pieces.at(piece))
    for index in range(num_parts):
        loads.reads_s[index] = engine.reads_s(pieces.longest_tokens[long[part_of_long == index]])
    large = np.flatnonzero((part < 0) & ~is_small)
    size = np.maximum(pieces.compute_s[large], pieces.memory_s[large])
    for piece in large[np.argsort(-size, kind="stable")].tolist():
        one = pieces.at(piece)
        part[piece] = int(loads.time_with(*one).argmin())
        loads.add(int(part[piece]), *one)
    small = np.flatnonzero(part < 0)
    compute_s, memory_s = float(pieces.compute_s[small].sum()), float(pieces.memory_s[small].sum())
    shares = _even_shares(loads, compute_s, memory_s)
    part[small] = _in_proportion(shares, len(small))
    return float(loads.time_with(shares * compute_s, shares * memory_s).max()), part


def _even_shares(loads: _Loads, compute_s: float, memory_s: float) -> Floats:
    """Shares of divisible work that let all parts end together, or as nearly so as what they have allows."""
    num_parts = len(loads.longest)

    def shares_until(time_s: float) -> Floats:
        low, high = np.zeros(num_parts), np.ones(num_parts)
        for _ in range(_NUM_HALVINGS):
            middle = (low + high) / 2
            is_within = loads.time_with(middle * compute_s, middle * memory_s) <= time_s
            low, high = np.where(is_within, middle, low), np.where(is_within, high, middle)
        return low

    low, high = 0.0, float(loads.time_with(compute_s, memory_s).max())
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if shares_until(middle).sum() >= 1 else (middle, high)
    shares = shares_until(high)
    total = float(shares.sum())
    return shares / total if total > 0 else np.full(num_parts, 1 / num_parts)


def _in_proportion(shares: Floats, count: int) -> Int64s:
    """Parts of a row of pieces, so that every stretch of the row is divided by the shares."""
    places = ((np.arange(count) + 0.5) * _GOLDEN) % 1.0
    parts: Int64s = np.minimum(np.searchsorted(np.cumsum(shares), places), len(shares) - 1)
    return parts
