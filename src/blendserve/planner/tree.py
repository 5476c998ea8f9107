"""The prefix tree of a job as flat arrays, built from sorted prompts and the prefixes that neighbours share.

Every subtree is a contiguous range of the sorted order, so any sum over it is a difference of two prefix sums (see
`aggregates`). No object per node, no recursion. Source: paper section 5.1; run-time reuse is `engine.prefix_cache`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from blendserve.planner.sorting import FlatPrompts, Int64s, SortedPrompts, flatten, sort_prompts
from blendserve.request import TokenIds

BLOCK_KEY_BITS = 24  # a synthetic block key is node << BLOCK_KEY_BITS | block: prompts below 2^24 blocks


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A compressed trie of prompts: inner nodes are shared segments, leaves are distinct prompts.

    Shapes: `order` int64[num_requests], request indices in sorted order; leaf j owns order[leaf_start[j] :
    leaf_start[j + 1]] (identical prompts) and shares `leaf_lcp[j]` tokens with leaf j - 1; `leaf_of`
    int64[num_requests] maps a request to its leaf. Nodes: inner ones first, in preorder, the root being 0; leaf j is
    node num_inner + j. `parent` (-1 for the root), `prefix_len`, `first_leaf`, `last_leaf`, `level` are
    int64[num_nodes]; the subtree of a node is leaves [first_leaf, last_leaf), and parents come before their children.
    """

    order: Int64s
    leaf_start: Int64s
    leaf_lcp: Int64s
    leaf_of: Int64s
    num_inner: int
    parent: Int64s
    prefix_len: Int64s
    first_leaf: Int64s
    last_leaf: Int64s
    level: Int64s

    @property
    def num_requests(self) -> int:
        return len(self.order)

    @property
    def num_leaves(self) -> int:
        return len(self.leaf_lcp)

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def leaf_len(self) -> Int64s:
        """Prompt tokens of every leaf."""
        return self.prefix_len[self.num_inner :]

    @property
    def leaf_count(self) -> Int64s:
        """Requests of every leaf."""
        return np.diff(self.leaf_start)

    @property
    def num_prompt_tokens(self) -> int:
        return int((self.leaf_len * self.leaf_count).sum())

    @property
    def num_unique_tokens(self) -> int:
        """Prompt tokens that a depth-first walk computes when nothing is ever evicted."""
        return int((self.leaf_len - self.leaf_lcp).sum())

    @property
    def sharing(self) -> float:
        """Share of prompt tokens that need no computation in depth-first order: the most possible."""
        return 1.0 - self.num_unique_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @classmethod
    def from_prompts(cls, prompts: Iterable[TokenIds]) -> PrefixTree:
        return cls.from_flat(flatten(prompts))

    @classmethod
    def from_flat(cls, prompts: FlatPrompts) -> PrefixTree:
        return cls.from_sorted(*sort_prompts(prompts))

    @classmethod
    def from_sorted(cls, order: Int64s, lcp: Int64s, lengths: Int64s) -> PrefixTree:
        """Build the tree from sorted prompts, whose tokens need not exist (synthetic workloads).

        Shapes: all int64[num_requests] in sorted order, see `SortedPrompts`. lcp[i] <= min(lengths[i - 1], lengths[i]).
        """
        return _build(
            SortedPrompts(np.asarray(order, np.int64), np.asarray(lcp, np.int64), np.asarray(lengths, np.int64))
        )

    def in_blocks(self, block_size: int) -> PrefixTree:
        """The same leaves, sharing only what fills KV blocks: no engine shares less, so that a prefix shorter than
        a block is no reason to keep leaves together."""
        leaf_lcp = self.leaf_lcp // block_size * block_size
        return _with_inner_nodes(self.order, self.leaf_start, self.leaf_of, leaf_lcp, self.leaf_len)

    def block_keys(self, request: int, block_size: int) -> Sequence[int]:
        """Keys of the full prompt blocks of a request: equal exactly where the prompts agree up to the block's end.

        The key of a block is the node in whose segment it ends, and its number; no token is looked at.
        """
        node = self.num_inner + int(self.leaf_of[request])
        parent, prefix_len = self.parent, self.prefix_len
        keys = [0] * (int(prefix_len[node]) // block_size)
        last = len(keys)
        while last > 0:
            above = int(parent[node])
            first = int(prefix_len[above]) // block_size
            base = node << BLOCK_KEY_BITS
            for block in range(first, last):
                keys[block] = base | block
            node, last = above, min(first, last)
        return keys

    def restrict(self, requests: Int64s) -> PrefixTree:
        """The tree of some of the requests (ascending), renumbered from 0 in that order."""
        rank = np.full(self.num_requests, -1, dtype=np.int64)
        rank[requests] = np.arange(len(requests))
        is_first = np.zeros(self.num_requests, dtype=np.bool_)
        is_first[self.leaf_start[:-1]] = True
        leaves = self.leaf_of[self.order]
        lengths = self.leaf_len[leaves]
        lcp = np.where(is_first, self.leaf_lcp[leaves], lengths)
        kept = np.flatnonzero(rank[self.order] >= 0)
        shared = np.zeros(len(kept), dtype=np.int64)
        if len(kept) > 1:
            shared[1:] = np.minimum.reduceat(lcp[: kept[-1] + 1], kept[:-1] + 1)
        return PrefixTree.from_sorted(rank[self.order[kept]], shared, lengths[kept])

    def check(self) -> None:
        """Assert the invariants of the arrays."""
        assert self.leaf_start[0] == 0
        assert self.leaf_start[-1] == self.num_requests
        assert (np.sort(self.order) == np.arange(self.num_requests)).all()
        assert self.parent[0] == -1
        assert (self.parent[1:] < np.minimum(np.arange(1, self.num_nodes), self.num_inner)).all()
        child, above = np.arange(1, self.num_nodes), self.parent[1:]
        assert (self.first_leaf[child] >= self.first_leaf[above]).all()
        assert (self.last_leaf[child] <= self.last_leaf[above]).all()
        assert (self.prefix_len[child] >= self.prefix_len[above]).all()
        assert (self.level[child] == self.level[above] + 1).all()
        inner = child[child < self.num_inner]
        assert (self.prefix_len[inner] > self.prefix_len[self.parent[inner]]).all()


def _build(prompts: SortedPrompts) -> PrefixTree:
    is_new = np.ones(len(prompts.order), dtype=np.bool_)
    is_new[1:] = (prompts.lcp[1:] < prompts.lengths[1:]) | (prompts.lengths[1:] != prompts.lengths[:-1])
    leaf_start = np.append(np.flatnonzero(is_new), len(prompts.order)).astype(np.int64)
    leaf_lcp, leaf_len = prompts.lcp[is_new], prompts.lengths[is_new]
    leaf_of = np.empty(len(prompts.order), dtype=np.int64)
    leaf_of[prompts.order] = np.cumsum(is_new) - 1
    return _with_inner_nodes(prompts.order, leaf_start, leaf_of, leaf_lcp, leaf_len)


def _with_inner_nodes(
    order: Int64s, leaf_start: Int64s, leaf_of: Int64s, leaf_lcp: Int64s, leaf_len: Int64s
) -> PrefixTree:
    num_leaves = len(leaf_lcp)
    first, last, length, inner_parent, leaf_parent = _intervals(leaf_lcp)
    preorder = np.lexsort((length, first))
    rank = np.empty_like(preorder)
    rank[preorder] = np.arange(len(preorder))
    inner_parent = inner_parent[preorder]
    inner_parent[1:] = rank[inner_parent[1:]]
    parent = np.concatenate([inner_parent, rank[leaf_parent]])
    leaves = np.arange(num_leaves)
    return PrefixTree(
        order=order,
        leaf_start=leaf_start,
        leaf_lcp=leaf_lcp,
        leaf_of=leaf_of,
        num_inner=len(preorder),
        parent=parent,
        prefix_len=np.concatenate([length[preorder], leaf_len]),
        first_leaf=np.concatenate([first[preorder], leaves]),
        last_leaf=np.concatenate([last[preorder], leaves + 1]),
        level=_levels(parent, len(preorder)),
    )


def _intervals(lcp: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s, Int64s]:
    """The inner nodes of the tree: maximal ranges of leaves that share a prefix, in the order they open.

    Returns first leaf, end, prefix length and parent of every inner node, and the parent of every leaf. One pass
    with a stack of open ranges; a range whose prefix breaks at leaf i ends there.
    """
    first, last, length, parent = [0], [len(lcp)], [0], [-1]
    leaf_parent: list[int] = []
    open_nodes = [0]
    for leaf, shared in enumerate(lcp.tolist()[1:], start=1):
        top = open_nodes[-1]
        if shared == length[top]:
            leaf_parent.append(top)
            continue
        begin, closed = leaf - 1, -1
        owner = top
        while length[top] > shared:
            closed = open_nodes.pop()
            last[closed], begin = leaf, first[closed]
            top = open_nodes[-1]
            parent[closed] = top
        if length[top] < shared:
            node = len(first)
            first.append(begin)
            last.append(len(lcp))
            length.append(shared)
            parent.append(top)
            open_nodes.append(node)
            if closed >= 0:
                parent[closed] = node
            else:
                owner = node
        leaf_parent.append(owner)
    if len(lcp):
        leaf_parent.append(open_nodes[-1])
    first_leaf, last_leaf, prefix_len, above, of_leaf = (
        np.array(values, dtype=np.int64) for values in (first, last, length, parent, leaf_parent)
    )
    return first_leaf, last_leaf, prefix_len, above, of_leaf


def _levels(parent: Int64s, num_inner: int) -> Int64s:
    levels = [0]
    for above in parent[1:num_inner].tolist():
        levels.append(levels[above] + 1)
    inner = np.array(levels, dtype=np.int64)
    return np.concatenate([inner, inner[parent[num_inner:]] + 1])
