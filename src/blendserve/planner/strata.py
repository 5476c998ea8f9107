"""Which requests are expected to have similar output lengths: the large subtrees of the prefix tree, nested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.base import Int64s
from blendserve.planner.tree import PrefixTree

MIN_STRATUM_REQUESTS = 128
"""Below this a subtree says too little of its own: 1% of it is one request."""
MAX_CHILD_SHARE = 0.8
"""A subtree that is nearly all of its parent says nothing new; also bounds the nesting of long chains."""


@dataclass(frozen=True, slots=True)
class Strata:
    """Nested large subtrees; stratum 0 is the root and holds every request that no other one does.

    Shapes: `parent` int64[num_strata], parents first, -1 for the root; `level` int64[num_strata]; `stratum_of`
    int64[num_requests], the deepest stratum of each request.
    """

    parent: Int64s
    level: Int64s
    stratum_of: Int64s

    def __len__(self) -> int:
        return len(self.parent)


def find_strata(tree: PrefixTree, *, min_requests: int = MIN_STRATUM_REQUESTS) -> Strata:
    """The inner nodes with at least `min_requests` requests that are well below their parent in size."""
    starts = tree.leaf_start
    first, last = tree.first_leaf[: tree.num_inner], tree.last_leaf[: tree.num_inner]
    size = starts[last] - starts[first]
    nodes = np.flatnonzero(size >= min_requests)
    stratum_of_node = {0: 0}
    parent, level, sizes = [-1], [0], [tree.num_requests]
    stratum_of_leaf = np.zeros(tree.num_leaves, dtype=np.int64)
    for node in nodes[nodes > 0].tolist():
        above = stratum_of_node[int(tree.parent[node])]
        if size[node] > MAX_CHILD_SHARE * sizes[above]:
            stratum_of_node[node] = above
            continue
        stratum_of_node[node] = len(parent)
        stratum_of_leaf[first[node] : last[node]] = len(parent)
        parent.append(above)
        level.append(level[above] + 1)
        sizes.append(int(size[node]))
    return Strata(np.array(parent), np.array(level), stratum_of_leaf[tree.leaf_of])


def split_by_prompt(strata: Strata, num_prompt_tokens: Int64s, *, min_requests: int = MIN_STRATUM_REQUESTS) -> Strata:
    """Divide each stratum by the order of magnitude of its prompts (powers of two), where a part is large enough.

    Requests are not served at random: long prompts come first, and where they have long answers, all that follow would
    be taken for long ones too. Shapes: `num_prompt_tokens` int64[num_requests], by request index.
    """
    magnitude = np.log2(np.maximum(num_prompt_tokens, 1)).astype(np.int64)
    return split_by(strata, magnitude, min_requests=min_requests)


def split_by(strata: Strata, kind: Int64s, *, min_requests: int = MIN_STRATUM_REQUESTS) -> Strata:
    """Divide each stratum by `kind`, where a part is large enough. Shapes: `kind` int64[num_requests], by request
    index.
    """
    parts, part_of, counts = np.unique(
        np.stack([strata.stratum_of, kind], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    above = parts[:, 0]
    size = np.bincount(strata.stratum_of, minlength=len(strata))
    is_own = (counts >= min_requests) & (counts <= MAX_CHILD_SHARE * size[above])
    number = np.where(is_own, len(strata) + np.cumsum(is_own) - 1, above)
    return Strata(
        parent=np.concatenate([strata.parent, above[is_own]]),
        level=np.concatenate([strata.level, strata.level[above[is_own]] + 1]),
        stratum_of=number[part_of.ravel()],
    )


def choose_samples(
    tree: PrefixTree, strata: Strata, is_unknown: NDArray[np.bool_], *, rate: float, seed: int
) -> Int64s:
    """Requests to run first, in prefix-tree order: `rate` of each stratum's unknown lengths, at least one.

    They stand evenly along the sorted prompts of their stratum, from a start drawn with `seed`.
    """
    requests = tree.order[is_unknown[tree.order]]
    if not len(requests) or rate <= 0:
        return np.zeros(0, dtype=np.int64)
    stratum = strata.stratum_of[requests]
    counts = np.bincount(stratum, minlength=len(strata))
    share = np.minimum(1.0, np.maximum(1, np.rint(rate * counts)) / np.maximum(counts, 1))
    by_stratum = np.argsort(stratum, kind="stable")
    begins = np.cumsum(counts) - counts
    rank = np.empty(len(requests), dtype=np.int64)
    rank[by_stratum] = np.arange(len(requests)) - begins[stratum[by_stratum]]
    offset = np.random.default_rng(seed).random(len(strata))[stratum]
    step = share[stratum]
    is_sample = np.floor((rank + 1) * step + offset * (1 - 1e-9)) > np.floor(rank * step + offset * (1 - 1e-9))
    samples: Int64s = requests[is_sample]
    return samples
