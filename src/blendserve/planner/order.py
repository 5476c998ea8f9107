"""The order of leaves, compute-intensive first: layer-wise sort, conditional splits, merged units (paper section 5.2).

Deviation from the paper, which splits by a threshold on the length of the prefix alone: what may be lost is one budget
(1% of the sharing), spent on the leaves that are furthest from the rest of their subtree for the tokens they cost. A
leaf within 1% of the job's work of its place is in place: real sequences are full of such noise, not worth a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import CostModel, Floats
from blendserve.planner.aggregates import LeafCosts, kept_lcp, node_costs
from blendserve.planner.base import Int64s
from blendserve.planner.tree import PrefixTree

DEFAULT_KEPT_SHARING = 0.99
DEFAULT_TOLERANCE = 0.01
"""Distance from its place, as a share of all work, below which a leaf is not split."""
OUTLYING_NOISE = 1e-9
"""Rounding of sums of work: not a distance."""


@dataclass(frozen=True, slots=True)
class LeafOrder:
    """A sequence of all leaves, compute end first, and what it costs in sharing.

    Shapes: `leaves` int64[num_leaves]; `is_split` bool[num_leaves], moved to the root; `first_position` and
    `last_position` int64[num_nodes]: the subtree's leaves, without those that were split off, are
    leaves[first_position : last_position]; `unit_start` int64[num_units + 1] cuts the sequence into units that share no
    prefix with each other. `num_unique_tokens` are prompt tokens a depth-first walk over the sequence computes;
    `max_split_tokens` is the longest prefix given up for a split; `num_rounds` counts sorts.
    """

    leaves: Int64s
    is_split: NDArray[np.bool_]
    first_position: Int64s
    last_position: Int64s
    unit_start: Int64s
    num_unique_tokens: int
    max_split_tokens: int
    num_rounds: int

    def sharing(self, tree: PrefixTree) -> float:
        """Share of prompt tokens that a depth-first walk over the sequence need not compute."""
        return 1.0 - self.num_unique_tokens / tree.num_prompt_tokens if tree.num_prompt_tokens else 0.0


def order_leaves(
    tree: PrefixTree,
    cost: CostModel,
    leaves: LeafCosts,
    *,
    kept_sharing: float = DEFAULT_KEPT_SHARING,
    tolerance: float = DEFAULT_TOLERANCE,
) -> LeafOrder:
    """Sort and split until densities fall along the sequence (every leaf within `tolerance` of its place), or every
    leaf that is an outlier in its subtree costs more than the budget left.

    Every round splits at least one leaf that was not split before, so there are at most num_leaves + 1 rounds.
    """
    num_shared = tree.num_prompt_tokens - tree.num_unique_tokens
    budget = int((1.0 - kept_sharing) * num_shared)
    is_split = np.zeros(tree.num_leaves, dtype=np.bool_)
    max_split_tokens = num_rounds = 0
    while True:
        num_rounds += 1
        num_unique = _num_unique_tokens(tree, is_split)
        first, last = _layer_wise_positions(tree, node_costs(tree, cost, leaves, ~is_split).density, is_split)
        sequence = np.empty(tree.num_leaves, dtype=np.int64)
        sequence[first[tree.num_inner :]] = np.arange(tree.num_leaves)
        left = budget - (num_unique - tree.num_unique_tokens)
        chosen, tokens = _choose_splits(tree, leaves, sequence, is_split, left, tolerance)
        if not len(chosen):
            break
        is_split[chosen] = True
        max_split_tokens = max(max_split_tokens, int(tokens.max()))
    return LeafOrder(
        leaves=sequence,
        is_split=is_split,
        first_position=first,
        last_position=last,
        unit_start=_merged_units(tree, sequence, is_split, leaves.work_s),
        num_unique_tokens=num_unique,
        max_split_tokens=max_split_tokens,
        num_rounds=num_rounds,
    )


def misplaced(densities: Floats, work: Floats, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Which entries break a falling sequence (denser than one before them, or less dense than one after) and stand
    further from where they belong than a share `tolerance` of all work."""
    if not len(densities):
        return np.zeros(0, dtype=np.bool_)
    lowest_before = np.minimum.accumulate(densities)
    highest_after = np.maximum.accumulate(densities[::-1])[::-1]
    is_misplaced: NDArray[np.bool_] = (densities > lowest_before) | (densities < highest_after)
    if tolerance > 0 and is_misplaced.any():
        middle = np.cumsum(work) - work / 2
        is_misplaced &= np.abs(middle - _places(densities, work)) > tolerance * work.sum()
    return is_misplaced


def split_tokens(tree: PrefixTree, is_split: NDArray[np.bool_]) -> Int64s:
    """Prompt tokens that would be computed once more if a leaf left its subtree now; 0 for leaves that have."""
    kept = np.flatnonzero(~is_split)
    shared = np.append(kept_lcp(tree, kept), 0)
    tokens = np.zeros(tree.num_leaves, dtype=np.int64)
    tokens[kept] = np.maximum(shared[:-1], shared[1:])
    return tokens


def outlying(tree: PrefixTree, leaves: LeafCosts) -> Floats:
    """Work between the place of each leaf and the mean place of its child of the root, by the leaves' own densities.

    Shapes: float64[num_leaves]. Units: seconds.
    """
    place, child = _places(leaves.density, leaves.work_s), _root_children(tree)
    weight = np.maximum(leaves.work_s, 1e-300)
    mean = np.bincount(child, weight * place) / np.maximum(np.bincount(child, weight), 1e-300)
    distance: Floats = np.abs(place - mean[child])
    return distance


def _choose_splits(
    tree: PrefixTree, leaves: LeafCosts, sequence: Int64s, is_split: NDArray[np.bool_], budget: int, tolerance: float
) -> tuple[Int64s, Int64s]:
    """Leaves to split within the budget, best first by (work x distance from their subtree) per token, and their costs.

    Costs of a round add up to at least its true loss: leaving a subtree can only cheapen its neighbours' leaving.
    """
    nothing = np.zeros(0, dtype=np.int64)
    tokens = split_tokens(tree, is_split)
    is_free = ~is_split & (tree.level[tree.num_inner :] > 1) & (tokens <= budget)
    if not is_free.any() or not misplaced(leaves.density[sequence], leaves.work_s[sequence], tolerance).any():
        return nothing, nothing
    distance = outlying(tree, leaves)
    candidates = np.flatnonzero(is_free & (distance > max(tolerance, OUTLYING_NOISE) * leaves.work_s.sum()))
    gain = (leaves.work_s * distance)[candidates]
    cost = tokens[candidates]
    best_first = np.argsort(-gain / np.maximum(cost, 1), kind="stable")
    before = np.cumsum(gain[best_first]) - gain[best_first]
    best_first = best_first[before <= gain.sum() / 2]  # the rest may be in place once these have left
    accepted = best_first[_fits_within(cost[best_first], budget)]
    return candidates[accepted], cost[accepted]


def _fits_within(costs: Int64s, budget: int) -> Int64s:
    """Positions taken by a greedy walk that skips what no longer fits."""
    taken: list[Int64s] = []
    positions = np.arange(len(costs))
    while len(positions):
        total = np.cumsum(costs[positions])
        num_taken = int(np.searchsorted(total, budget, side="right"))
        taken.append(positions[:num_taken])
        budget -= int(total[num_taken - 1]) if num_taken else 0
        positions = positions[num_taken:]
        positions = positions[costs[positions] <= budget]
    return np.concatenate(taken) if taken else positions


def _places(densities: Floats, work: Floats) -> Floats:
    """Middle of each entry on the axis of all work sorted by falling density; equal densities share one place."""
    by_density = np.argsort(-densities, kind="stable")
    ordered = densities[by_density]
    is_new = np.ones(len(ordered), dtype=np.bool_)
    is_new[1:] = ordered[1:] != ordered[:-1]
    group = np.cumsum(is_new) - 1
    size = np.bincount(group, work[by_density])
    places = np.empty(len(work))
    places[by_density] = (np.cumsum(size) - size / 2)[group]
    return places


def _num_unique_tokens(tree: PrefixTree, is_split: NDArray[np.bool_]) -> int:
    kept = np.flatnonzero(~is_split)
    return int(tree.leaf_len.sum() - kept_lcp(tree, kept).sum())


def _layer_wise_positions(tree: PrefixTree, density: Floats, is_split: NDArray[np.bool_]) -> tuple[Int64s, Int64s]:
    """First and last position of every subtree when the children of every node stand by falling density.

    A subtree begins where its parent begins plus the leaves of the siblings before it, level by level from the root.
    """
    num_leaves = np.zeros(tree.num_leaves + 1, dtype=np.int64)
    np.cumsum(~is_split, out=num_leaves[1:])
    size = num_leaves[tree.last_leaf] - num_leaves[tree.first_leaf]
    size[tree.num_inner :] = 1
    size[0] = tree.num_leaves
    parent, level = tree.parent.copy(), tree.level.copy()
    split_nodes = tree.num_inner + np.flatnonzero(is_split)
    parent[split_nodes], level[split_nodes] = 0, 1

    siblings = np.lexsort((-density[1:], parent[1:])) + 1
    begins = np.cumsum(size[siblings]) - size[siblings]
    is_first = np.ones(len(siblings), dtype=np.bool_)
    is_first[1:] = parent[siblings[1:]] != parent[siblings[:-1]]
    group = np.cumsum(is_first) - 1
    first = np.zeros(tree.num_nodes, dtype=np.int64)
    first[siblings] = begins - begins[is_first][group]

    by_level = np.argsort(level, kind="stable")
    bounds = np.searchsorted(level[by_level], np.arange(2, int(level.max()) + 2))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        nodes = by_level[begin:end]
        first[nodes] += first[parent[nodes]]
    return first, first + size


def _merged_units(tree: PrefixTree, sequence: Int64s, is_split: NDArray[np.bool_], work_s: Floats) -> Int64s:
    """Cut the sequence where no prefix is shared, then join neighbours while together they stay small.

    Neighbours at the root share nothing, so joining them costs nothing and leaves fewer pieces to hand out.
    """
    if not len(sequence):
        return np.zeros(1, dtype=np.int64)
    child = _root_children(tree)[sequence]
    child[is_split[sequence]] = -1 - sequence[is_split[sequence]]
    is_cut = np.ones(len(sequence), dtype=np.bool_)
    is_cut[1:] = child[1:] != child[:-1]
    starts = np.flatnonzero(is_cut)
    before = np.cumsum(work_s[sequence]) - work_s[sequence]
    pieces = max(1, min(len(starts), 1024))
    bucket = (before[starts] / max(float(work_s.sum()), 1e-300) * pieces).astype(np.int64)
    is_kept = np.ones(len(starts), dtype=np.bool_)
    is_kept[1:] = bucket[1:] != bucket[:-1]
    return np.append(starts[is_kept], len(sequence))


def _root_children(tree: PrefixTree) -> Int64s:
    """The child of the root above every leaf, int64[num_leaves]: subtrees end where neighbours share nothing."""
    return np.cumsum(tree.leaf_lcp == 0)
