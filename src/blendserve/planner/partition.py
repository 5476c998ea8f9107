"""Parts of a plan for data parallelism: equal in both resources, cutting few prefixes (paper section 5.5).

Deviation from the paper, which hands out runs from the two ends: pieces that share a prefix are dealt largest first to
the part that has least. Where it is known what steps cost, parts are made even in time instead, which counts the steps
that the longest requests need (`deal.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import Floats
from blendserve.errors import ConfigError
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.deal import Pieces, deal_evenly_in_time
from blendserve.planner.part_time import PartEngine
from blendserve.planner.plan import Plan

MAX_PIECE_SHARE = 1 / 16
"""A subtree larger than this share of a part is cut: the price is its prefix once more per piece."""
MIN_PIECE_SHARE = 1 / 2000
"""Pieces smaller than this share of a part are dealt in turn: looking at each would not balance better."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Shapes: `parts`: request indices of each part, ascending; `compute_s`, `memory_s` float64[n] (estimates, the
    prefixes of cut subtrees counted once). `num_lost_tokens`: prompt tokens computed again because of the cuts.
    """

    parts: tuple[Int64s, ...]
    compute_s: Floats
    memory_s: Floats
    num_lost_tokens: int
    num_prompt_tokens: int

    @property
    def imbalance(self) -> float:
        """How far the fullest part is above the mean, in the resource where that is worse."""
        worst = 0.0
        for work in (self.compute_s, self.memory_s):
            if work.sum() > 0:
                worst = max(worst, float(work.max() / work.mean()) - 1.0)
        return worst

    @property
    def density_spread(self) -> float:
        """Largest over smallest density of the parts, less 1."""
        density = self.compute_s / np.maximum(self.memory_s, 1e-300)
        return float(density.max() / max(float(density.min()), 1e-300)) - 1.0

    @property
    def sharing_lost(self) -> float:
        """Share of all prompt tokens that the cuts make parts compute again."""
        return self.num_lost_tokens / max(1, self.num_prompt_tokens)


def partition(plan: Plan, num_parts: int, engine: PartEngine | None = None) -> Partition:
    """Divide a plan among replicas, whose steps cost what `engine` says where that is known.

    Raises: ConfigError when the number of parts is not positive.
    """
    if num_parts < 1:
        raise ConfigError(f"a partition into {num_parts} parts; ask for at least 1")
    schedule, order = plan.schedule, plan.schedule.order
    compute_s, memory_s = schedule.compute_s[order], schedule.memory_s[order]
    shared = schedule.num_shared_tokens[order]
    starts = _piece_starts(shared, _work(compute_s, memory_s), num_parts)
    part = np.zeros(len(order), dtype=np.int64)
    if len(order):
        pieces = Pieces(
            np.add.reduceat(compute_s, starts),
            np.add.reduceat(memory_s, starts),
            np.maximum.reduceat(schedule.expected_output_tokens[order], starts),
        )
        part = np.repeat(_deal(pieces, num_parts, engine), np.diff(np.append(starts, len(order))))
    parts = tuple(np.sort(order[part == index]) for index in range(num_parts))
    return Partition(
        parts=parts,
        compute_s=_sums(part, compute_s, num_parts),
        memory_s=_sums(part, memory_s, num_parts),
        num_lost_tokens=_num_unique_tokens(plan, parts) - plan.tree.num_unique_tokens,
        num_prompt_tokens=plan.tree.num_prompt_tokens,
    )


def part_table(table: RequestTable, requests: Int64s) -> RequestTable:
    """The rows of one part, renumbered as `PrefixTree.restrict` does."""
    return RequestTable(
        table.num_prompt_tokens[requests], table.max_output_tokens[requests], table.known_output_tokens[requests]
    )


def _sums(part: Int64s, values: Floats, num_parts: int) -> Floats:
    return np.bincount(part, values, num_parts).astype(np.float64)


def _work(compute_s: Floats, memory_s: Floats) -> Floats:
    """Share of the job that a request is, in the resource where it is more."""
    return np.maximum(compute_s / max(float(compute_s.sum()), 1e-300), memory_s / max(float(memory_s.sum()), 1e-300))


def _piece_starts(shared: Int64s, work: Floats, num_parts: int) -> Int64s:
    """Cut where no full block is shared with the request before, and inside what is larger than a piece may be."""
    if not len(shared):
        return np.zeros(0, dtype=np.int64)
    is_cut = shared < BLOCK_SIZE
    is_cut[0] = True
    before = np.cumsum(work) - work
    starts = np.flatnonzero(is_cut)
    run = np.cumsum(is_cut) - 1
    serial = ((before - before[starts][run]) / (MAX_PIECE_SHARE / num_parts)).astype(np.int64)
    is_cut[1:] |= serial[1:] != serial[:-1]
    cuts: Int64s = np.flatnonzero(is_cut)
    return cuts if num_parts > 1 else np.zeros(1, dtype=np.int64)


def _deal(pieces: Pieces, num_parts: int, engine: PartEngine | None) -> Int64s:
    """A part for every piece."""
    work = np.stack([pieces.compute_s, pieces.memory_s], axis=1)
    shares = work / np.maximum(work.sum(axis=0), 1e-300)
    size = shares.max(axis=1)
    is_small = size < MIN_PIECE_SHARE / num_parts
    if engine is not None and num_parts > 1:
        return deal_evenly_in_time(pieces, num_parts, engine, is_small)
    part = np.zeros(len(size), dtype=np.int64)
    small = np.flatnonzero(is_small)
    part[small] = np.arange(len(small)) % num_parts
    load = np.stack([_sums(part[small], shares[small, column], num_parts) for column in (0, 1)], axis=1)
    large = np.flatnonzero(~is_small)
    for piece in large[np.argsort(-size[large], kind="stable")].tolist():
        chosen = int((load + shares[piece]).max(axis=1).argmin())
        load[chosen] += shares[piece]
        part[piece] = chosen
    return part


def _num_unique_tokens(plan: Plan, parts: tuple[Int64s, ...]) -> int:
    return sum(plan.tree.restrict(requests).num_unique_tokens for requests in parts)
