"""The order of requests and what each adds to the work, from the estimates of one moment; cheap enough to redo while
requests run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import CostModel, Floats
from blendserve.planner.aggregates import leaf_costs, node_costs
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.lengths import Lengths
from blendserve.planner.order import DEFAULT_KEPT_SHARING, LeafOrder, order_leaves
from blendserve.planner.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class Schedule:
    """Requests by falling density, prefixes together.

    Shapes: `order` int64[num_requests], compute end first; by request index, float64[num_requests]:
    `expected_output_tokens`, `compute_s` (with what earlier requests of the order share taken off), `memory_s` and
    `density` (of the request alone); `num_shared_tokens` int64[num_requests], the prompt tokens that were taken off. By
    node, int64[num_nodes]: the subtree's requests, but for leaves split off, are order[first_position :
    last_position]. Units: seconds.
    """

    leaf_order: LeafOrder
    order: Int64s
    first_position: Int64s
    last_position: Int64s
    expected_output_tokens: Floats
    compute_s: Floats
    memory_s: Floats
    density: Floats
    num_shared_tokens: Int64s
    root_density: float


def make_schedule(
    tree: PrefixTree,
    table: RequestTable,
    cost: CostModel,
    lengths: Lengths,
    *,
    kept_sharing: float = DEFAULT_KEPT_SHARING,
) -> Schedule:
    """Order all requests by the present estimates of their lengths. Mutates nothing."""
    requests = np.arange(len(table))
    expected, squared = lengths.moments(requests, np.zeros(len(table), dtype=np.int64))
    prompts = table.num_prompt_tokens
    compute_s = cost.compute_s(prompts, expected)
    memory_s = cost.kv_token_s * (prompts * expected + squared / 2)
    leaves = leaf_costs(tree, cost, compute_s, memory_s)
    root_density = float(node_costs(tree, cost, leaves).density[0])
    leaf_order = order_leaves(tree, cost, leaves, kept_sharing=kept_sharing)
    order, leaf_begin = _request_order(tree, leaf_order)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(memory_s > 0, compute_s / memory_s, np.inf)
    return Schedule(
        leaf_order=leaf_order,
        order=order,
        first_position=leaf_begin[leaf_order.first_position],
        last_position=leaf_begin[leaf_order.last_position],
        expected_output_tokens=expected,
        compute_s=compute_s - _shared(tree, leaf_order, order, leaf_begin, cost.prefix_compute_s(tree.prefix_len)),
        memory_s=memory_s,
        density=density,
        num_shared_tokens=_shared(tree, leaf_order, order, leaf_begin, tree.prefix_len.astype(np.float64)).astype(
            np.int64
        ),
        root_density=root_density,
    )


def _request_order(tree: PrefixTree, leaf_order: LeafOrder) -> tuple[Int64s, Int64s]:
    """Requests leaf by leaf, and the position where each leaf of the sequence begins (with the end appended)."""
    counts = tree.leaf_count[leaf_order.leaves]
    begin = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=begin[1:])
    source = np.repeat(tree.leaf_start[:-1][leaf_order.leaves] - begin[:-1], counts) + np.arange(tree.num_requests)
    return tree.order[source], begin


def _shared(tree: PrefixTree, leaf_order: LeafOrder, order: Int64s, leaf_begin: Int64s, prefix: Floats) -> Floats:
    """What each request finds done by those before it, by request index: its prompt without the segments it opens.

    `prefix` float64[num_nodes] measures the prompt up to every node (tokens, seconds). The first leaf of a subtree
    opens the segment of its node; the first request of a leaf opens that of the leaf.
    """
    opened = np.zeros(tree.num_requests + 1)
    is_open = leaf_order.first_position < leaf_order.last_position
    is_open[0] = False
    above = tree.parent.copy()
    above[tree.num_inner :][leaf_order.is_split] = 0
    nodes = np.flatnonzero(is_open)
    np.add.at(opened, leaf_begin[leaf_order.first_position[nodes]], prefix[nodes] - prefix[above[nodes]])
    own = np.repeat(prefix[tree.num_inner :][leaf_order.leaves], np.diff(leaf_begin))
    shared = np.empty(tree.num_requests)
    shared[order] = np.maximum(own - opened[:-1], 0.0)
    return shared
