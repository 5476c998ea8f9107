"""Compute, memory and density of every node of a prefix tree, by prefix sums over its sorted leaves.

Density of a subtree is (1 - s) sum Comp / sum Mem (paper section 4). The factor is applied exactly: s is the share
of the subtree's compute that sharing saves, so that (1 - s) sum Comp is the compute of a depth-first walk over the
subtree in which every shared token is computed once. Without the p^2 term of the cost model that s is shared tokens
over all (prompt and output) tokens; on MMLU with 2 output tokens the two readings of s agree within 1%.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import CostModel, Floats, ratio
from blendserve.planner.base import Int64s
from blendserve.planner.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """Resource time of every node's subtree. Shapes: float64[num_nodes]. Units: seconds.

    `compute_s` counts every request in full; `saved_s` is what sharing inside the subtree saves of it.
    """

    compute_s: Floats
    saved_s: Floats
    memory_s: Floats

    @property
    def density(self) -> Floats:
        """Compute density with sharing taken off; infinite where nothing is decoded."""
        return ratio(np.maximum(self.compute_s - self.saved_s, 0.0), self.memory_s)


@dataclass(frozen=True, slots=True)
class LeafCosts:
    """Resource time of every leaf, all its identical requests together. Shapes: float64[num_leaves]. Units: seconds."""

    compute_s: Floats
    saved_s: Floats
    memory_s: Floats
    prefix_s: Floats  # prefilling the leaf's prompt once

    @property
    def density(self) -> Floats:
        return ratio(self.compute_s - self.saved_s, self.memory_s)

    @property
    def work_s(self) -> Floats:
        """A leaf's weight where both resources count."""
        return self.compute_s - self.saved_s + self.memory_s


def leaf_costs(tree: PrefixTree, cost: CostModel, compute_s: Floats, memory_s: Floats) -> LeafCosts:
    """Sum request costs (float64[num_requests], by request index) over identical prompts."""
    starts = tree.leaf_start[:-1]
    prefix_s = cost.prefix_compute_s(tree.leaf_len)
    if not len(starts):
        return LeafCosts(prefix_s, prefix_s, prefix_s, prefix_s)
    return LeafCosts(
        compute_s=np.add.reduceat(compute_s[tree.order], starts),
        saved_s=(tree.leaf_count - 1) * prefix_s,
        memory_s=np.add.reduceat(memory_s[tree.order], starts),
        prefix_s=prefix_s,
    )


def node_costs(
    tree: PrefixTree, cost: CostModel, leaves: LeafCosts, is_kept: NDArray[np.bool_] | None = None
) -> NodeCosts:
    """Sum leaf costs over every subtree. Leaves outside `is_kept` bool[num_leaves] have left their subtree (they count
    for the root and for themselves only)."""
    kept = np.arange(tree.num_leaves) if is_kept is None else np.flatnonzero(is_kept)
    inner = slice(0, tree.num_inner)
    kept_before = np.arange(tree.num_leaves + 1)
    if is_kept is not None:
        np.cumsum(is_kept, out=kept_before[1:])
    first, last = kept_before[tree.first_leaf[inner]], kept_before[tree.last_leaf[inner]]
    shared_s = np.append(cost.prefix_compute_s(kept_lcp(tree, kept)), 0.0)

    def over_subtrees(values: Floats) -> Floats:
        total = np.zeros(len(values) + 1)
        np.cumsum(values, out=total[1:])
        sums: Floats = total[last] - total[first]
        return sums

    is_empty = first == last
    saved = over_subtrees(leaves.saved_s[kept] + shared_s[:-1]) - np.where(is_empty, 0.0, shared_s[first])
    compute, memory = over_subtrees(leaves.compute_s[kept]), over_subtrees(leaves.memory_s[kept])
    if is_kept is not None:
        gone = ~is_kept
        saved[0] += leaves.saved_s[gone].sum()
        compute[0] += leaves.compute_s[gone].sum()
        memory[0] += leaves.memory_s[gone].sum()
    return NodeCosts(
        compute_s=np.concatenate([compute, leaves.compute_s]),
        saved_s=np.concatenate([saved, leaves.saved_s]),
        memory_s=np.concatenate([memory, leaves.memory_s]),
    )


def kept_lcp(tree: PrefixTree, kept: Int64s) -> Int64s:
    """Prefix that each kept leaf shares with the kept leaf before it; `kept` ascends. The first one's is 0."""
    shared = np.zeros(len(kept), dtype=np.int64)
    if len(kept) > 1:
        shared[1:] = np.minimum.reduceat(tree.leaf_lcp[: kept[-1] + 1], kept[:-1] + 1)
    return shared
