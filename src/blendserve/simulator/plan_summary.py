"""What a plan says of a job before it runs: amounts, sharing, density, the two ends of the order, shared prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.plan import Plan
from blendserve.planner.sorting import FlatPrompts
from blendserve.request import TokenIds

Int64s = NDArray[np.int64]
Decode = Callable[[TokenIds], str]

END_SHARE_OF_WORK = 0.1
MAX_LISTED_PREFIXES = 10
_SHOWN_TOKENS = 48
_SHOWN_CHARACTERS = 90
_LEVELS = (0.0, 0.5, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Least, median, 99th percentile, greatest and mean of a length. Units: tokens."""

    least: int
    median: int
    p99: int
    greatest: int
    mean: float

    @classmethod
    def of(cls, values: NDArray[np.int64] | NDArray[np.float64]) -> LengthSummary:
        least, median, p99, greatest = (int(value) for value in np.quantile(values, _LEVELS, method="inverted_cdf"))
        return cls(least, median, p99, greatest, float(values.mean()))


@dataclass(frozen=True, slots=True)
class EndSummary:
    """The requests at one end of the order that hold a tenth of the work. Units: tokens, means over requests."""

    num_requests: int
    density: float
    mean_prompt_tokens: float
    mean_output_tokens: float


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A node of the prefix tree: its requests agree on the first `num_prefix_tokens`, of which the last
    `num_own_tokens` are not shared any wider. `text` is how those begin; `is_whole_prompt`: the prompts are identical.
    """

    node: int
    num_prefix_tokens: int
    num_own_tokens: int
    num_requests: int
    num_saved_tokens: int
    is_whole_prompt: bool
    text: str


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A job at a glance. `compute_s` has sharing taken off; densities are of the hardware that the plan was made for.

    `num_known_outputs` counts requests whose output length is fixed by the request itself.
    """

    num_requests: int
    num_distinct_prompts: int
    num_known_outputs: int
    num_samples: int
    prompt_tokens: int
    expected_output_tokens: int
    prompts: LengthSummary
    outputs: LengthSummary
    optimal_sharing: float
    planned_sharing: float
    num_split_leaves: int
    root_density: float
    compute_s: float
    memory_s: float
    compute_end: EndSummary
    memory_end: EndSummary
    prefixes: tuple[SharedPrefix, ...]


def summarize_plan(plan: Plan, prompts: FlatPrompts, decode: Decode) -> PlanSummary:
    """Describe a plan of at least one request."""
    schedule, table = plan.schedule, plan.table
    compute_end, memory_end = find_ends(plan)
    return PlanSummary(
        num_requests=plan.num_requests,
        num_distinct_prompts=plan.tree.num_leaves,
        num_known_outputs=int((table.known_output_tokens >= 0).sum()),
        num_samples=len(plan.samples),
        prompt_tokens=plan.tree.num_prompt_tokens,
        expected_output_tokens=round(float(plan.expected_output_tokens.sum())),
        prompts=LengthSummary.of(table.num_prompt_tokens),
        outputs=LengthSummary.of(plan.expected_output_tokens),
        optimal_sharing=plan.optimal_sharing,
        planned_sharing=plan.planned_sharing,
        num_split_leaves=int(schedule.leaf_order.is_split.sum()),
        root_density=plan.root_density,
        compute_s=float(schedule.compute_s.sum()),
        memory_s=float(schedule.memory_s.sum()),
        compute_end=compute_end,
        memory_end=memory_end,
        prefixes=find_prefixes(plan, prompts, decode),
    )


def find_ends(plan: Plan) -> tuple[EndSummary, EndSummary]:
    """The compute end and the memory end of the order: at least one request each."""
    order = plan.schedule.order
    work = np.cumsum((plan.schedule.compute_s + plan.schedule.memory_s)[order])
    limit = END_SHARE_OF_WORK * work[-1]
    num_first = max(1, int(np.searchsorted(work, limit, side="right")))
    first_of_last = min(len(order) - 1, int(np.searchsorted(work, work[-1] - limit, side="left")))
    return _end(plan, order[:num_first]), _end(plan, order[first_of_last:])


def _end(plan: Plan, requests: Int64s) -> EndSummary:
    compute_s = float(plan.schedule.compute_s[requests].sum())
    memory_s = float(plan.schedule.memory_s[requests].sum())
    return EndSummary(
        num_requests=len(requests),
        density=compute_s / memory_s if memory_s else float("inf"),
        mean_prompt_tokens=float(plan.table.num_prompt_tokens[requests].mean()),
        mean_output_tokens=float(plan.expected_output_tokens[requests].mean()),
    )


def requests_by_node(plan: Plan) -> Int64s:
    """Requests in the subtree of every node. Shapes: int64[num_nodes]."""
    tree = plan.tree
    return tree.leaf_start[tree.last_leaf] - tree.leaf_start[tree.first_leaf]


def saved_tokens(plan: Plan) -> Int64s:
    """Prompt tokens that sharing each node's own segment saves; all together what a depth-first walk saves.

    Shapes: int64[num_nodes].
    """
    return own_tokens(plan) * (requests_by_node(plan) - 1)


def own_tokens(plan: Plan) -> Int64s:
    """Length of each node's segment: its prefix without its parent's. Shapes: int64[num_nodes]."""
    tree = plan.tree
    above = np.where(tree.parent >= 0, tree.prefix_len[tree.parent], 0)
    return tree.prefix_len - above


def find_prefixes(plan: Plan, prompts: FlatPrompts, decode: Decode) -> tuple[SharedPrefix, ...]:
    """The nodes whose sharing saves most, best first."""
    saved = saved_tokens(plan)
    best = np.argsort(-saved, kind="stable")[:MAX_LISTED_PREFIXES]
    return tuple(describe_node(plan, prompts, decode, int(node)) for node in best if saved[node] > 0)


def describe_node(plan: Plan, prompts: FlatPrompts, decode: Decode, node: int) -> SharedPrefix:
    """One node of the tree, with the beginning of its segment as text."""
    tree = plan.tree
    first, last = int(tree.first_leaf[node]), int(tree.last_leaf[node])
    request = int(tree.order[tree.leaf_start[first]])
    num_requests = int(tree.leaf_start[last] - tree.leaf_start[first])
    length = int(tree.prefix_len[node])
    above = int(tree.prefix_len[tree.parent[node]]) if node else 0
    offset = int(prompts.offsets[request])
    shown = prompts.token_ids[offset + above : offset + min(length, above + _SHOWN_TOKENS)]
    return SharedPrefix(
        node=node,
        num_prefix_tokens=length,
        num_own_tokens=length - above,
        num_requests=num_requests,
        num_saved_tokens=(length - above) * (num_requests - 1),
        is_whole_prompt=node >= tree.num_inner,
        text=("… " if above else "") + one_line(decode(shown), _SHOWN_CHARACTERS),
    )


def one_line(text: str, max_characters: int) -> str:
    """Text without line breaks, runs of white space and control characters, cut where it is too long."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    joined = " ".join(printable.split())
    return joined if len(joined) <= max_characters else joined[: max_characters - 1] + "…"
