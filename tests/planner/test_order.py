"""Layer-wise sort, conditional splits and merged units."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import Prompt, unique_tokens, walk_tokens
from planner_cases import COST, outputs_strategy, plan_of, prompts_strategy, table_of, tree_of

from blendserve.planner.aggregates import LeafCosts, leaf_costs, node_costs
from blendserve.planner.order import LeafOrder, misplaced, order_leaves, outlying, split_tokens
from blendserve.planner.schedule import make_schedule
from blendserve.planner.tree import PrefixTree

jobs = prompts_strategy.flatmap(
    lambda prompts: st.tuples(st.just(prompts), st.tuples(*[outputs_strategy] * len(prompts)))
)


def costs_of(tree: PrefixTree, prompts: list[Prompt], outputs: tuple[int, ...]) -> LeafCosts:
    lengths = np.array([len(prompt) for prompt in prompts])
    return leaf_costs(tree, COST, COST.compute_s(lengths, outputs), COST.memory_s(lengths, outputs))


def leaf_prompts(tree: PrefixTree, prompts: list[Prompt], leaves: list[int]) -> list[Prompt]:
    return [prompts[tree.order[tree.leaf_start[leaf]]] for leaf in leaves]


def ordered(
    prompts: list[Prompt], outputs: tuple[int, ...], kept_sharing: float, tolerance: float = 0.0
) -> tuple[PrefixTree, LeafCosts, LeafOrder]:
    tree = tree_of(prompts)
    leaves = costs_of(tree, prompts, outputs)
    return tree, leaves, order_leaves(tree, COST, leaves, kept_sharing=kept_sharing, tolerance=tolerance)


@given(jobs, st.sampled_from([1.0, 0.99, 0.8, 0.5, 0.0]))
def test_the_promised_sharing_is_kept(job: tuple[list[Prompt], tuple[int, ...]], kept_sharing: float) -> None:
    prompts, outputs = job
    tree, _, order = ordered(prompts, outputs, kept_sharing)
    assert sorted(order.leaves.tolist()) == list(range(tree.num_leaves))
    walked = walk_tokens(leaf_prompts(tree, prompts, order.leaves.tolist()))
    assert walked <= order.num_unique_tokens
    assert (
        order.num_unique_tokens - tree.num_unique_tokens
        <= (1 - kept_sharing) * (tree.num_prompt_tokens - tree.num_unique_tokens) + 1e-9
    )
    if kept_sharing == 1.0:
        assert walked == unique_tokens(prompts)


@given(jobs, st.sampled_from([1.0, 0.9, 0.5, 0.0]), st.sampled_from([0.0, 0.01, 0.3]))
def test_splitting_ends_sorted_or_out_of_budget(
    job: tuple[list[Prompt], tuple[int, ...]], kept_sharing: float, tolerance: float
) -> None:
    """The paper's stopping condition, and each leaf splits at most once: every round but the last splits a new one."""
    prompts, outputs = job
    tree, leaves, order = ordered(prompts, outputs, kept_sharing, tolerance)
    assert order.num_rounds <= int(order.is_split.sum()) + 1
    budget = int((1 - kept_sharing) * (tree.num_prompt_tokens - tree.num_unique_tokens))
    left = budget - (order.num_unique_tokens - tree.num_unique_tokens)
    if misplaced(leaves.density[order.leaves], leaves.work_s[order.leaves], tolerance).any():
        tokens, distance = split_tokens(tree, order.is_split), outlying(tree, leaves)
        for leaf in np.flatnonzero(distance > max(tolerance, 1e-9) * leaves.work_s.sum()).tolist():
            is_at_root = tree.parent[tree.num_inner + leaf] == 0
            assert order.is_split[leaf] or is_at_root or tokens[leaf] > left


@given(jobs)
def test_siblings_stand_by_falling_density(job: tuple[list[Prompt], tuple[int, ...]]) -> None:
    prompts, outputs = job
    tree, leaves, order = ordered(prompts, outputs, 1.0)
    density = node_costs(tree, COST, leaves).density
    for node in range(tree.num_inner):
        children = sorted(np.flatnonzero(tree.parent == node).tolist(), key=lambda child: order.first_position[child])
        assert (density[children][1:] <= density[children][:-1]).all()
        bounds = [(int(order.first_position[child]), int(order.last_position[child])) for child in children]
        assert all(before[1] == after[0] for before, after in pairwise(bounds))


@given(jobs, st.sampled_from([1.0, 0.5, 0.0]))
def test_units_share_nothing_with_each_other(job: tuple[list[Prompt], tuple[int, ...]], kept_sharing: float) -> None:
    prompts, outputs = job
    tree, _, order = ordered(prompts, outputs, kept_sharing)
    units = zip(order.unit_start[:-1].tolist(), order.unit_start[1:].tolist(), strict=True)
    walked = [leaf_prompts(tree, prompts, order.leaves[begin:end].tolist()) for begin, end in units]
    assert sum(map(len, walked)) == tree.num_leaves
    assert sum(unique_tokens(unit) for unit in walked) <= order.num_unique_tokens


@given(jobs)
def test_charges_add_up_to_the_walk(job: tuple[list[Prompt], tuple[int, ...]]) -> None:
    prompts, outputs = job
    plan = plan_of(prompts, outputs)
    schedule = plan.schedule
    lengths = np.array([len(prompt) for prompt in prompts])
    assert sorted(schedule.order.tolist()) == list(range(len(prompts)))
    assert int((lengths - schedule.num_shared_tokens).sum()) == schedule.leaf_order.num_unique_tokens
    expected = schedule.leaf_order.num_unique_tokens * COST.token_s + sum(outputs) * COST.token_s
    assert float(schedule.compute_s.sum()) == pytest.approx(expected)
    assert float(schedule.memory_s.sum()) == pytest.approx(float(np.sum(COST.memory_s(lengths, outputs))))


def test_a_memory_intensive_outlier_leaves_a_compute_intensive_subtree() -> None:
    """Golden: one long answer among short ones with a shared prefix, beside a memory-intensive subtree."""
    stem, other = (1,) * 20, (2,) * 3
    prompts: list[Prompt] = (
        [(*stem, 5, index) for index in range(20)] + [(*stem, 6)] + [(*other, index) for index in range(20)]
    )
    outputs = (1,) * 20 + (800,) + (100,) * 20
    tree, leaves, order = ordered(prompts, outputs, 0.9)
    assert leaf_prompts(tree, prompts, np.flatnonzero(order.is_split).tolist()) == [(*stem, 6)]
    assert order.num_unique_tokens == tree.num_unique_tokens + 20
    assert order.max_split_tokens == 20
    assert not misplaced(leaves.density[order.leaves], leaves.work_s[order.leaves]).any()
    assert leaf_prompts(tree, prompts, order.leaves[-1:].tolist()) == [(*stem, 6)]


def test_density_ties_keep_the_sorted_order() -> None:
    prompts: list[Prompt] = [(index,) for index in range(10)]
    _, _, order = ordered(prompts, (3,) * 10, 0.99)
    assert order.leaves.tolist() == list(range(10))
    assert order.num_rounds == 1
    assert not order.is_split.any()


def test_zero_length_outputs_come_first() -> None:
    prompts = [(0,), (1,), (2,)]
    plan = plan_of(prompts, (5, 0, 1))
    assert plan.schedule.order.tolist() == [1, 2, 0]
    assert plan.schedule.density[1] == np.inf


def test_a_chain_10000_deep_is_ordered() -> None:
    lengths = np.arange(1, 10_001)
    tree = PrefixTree.from_sorted(np.arange(10_000), np.append(0, lengths[:-1]), lengths)
    outputs = np.arange(10_000) % 7 + 1
    leaves = leaf_costs(tree, COST, COST.compute_s(lengths, outputs), COST.memory_s(lengths, outputs))
    order = order_leaves(tree, COST, leaves)
    assert sorted(order.leaves.tolist()) == list(range(10_000))
    assert order.num_unique_tokens <= 10_000 + 0.01 * (int(lengths.sum()) - 10_000)


def test_an_empty_job_has_an_empty_schedule() -> None:
    plan = plan_of([], [])
    assert len(plan.schedule.order) == 0
    again = make_schedule(plan.tree, table_of([], []), COST, plan.new_lengths())
    assert len(again.order) == 0
