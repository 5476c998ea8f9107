"""The array tree against the trie that one gets by walking all requests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Prompt, node_totals, shared_prefix, subtree_prefixes, unique_tokens
from planner_cases import QUADRATIC_COST, outputs_strategy, prompts_strategy, tree_of

from blendserve.planner.aggregates import leaf_costs, node_costs
from blendserve.planner.sorting import flatten, sort_prompts
from blendserve.planner.tree import PrefixTree


@given(prompts_strategy)
def test_nodes_are_those_of_the_trie(prompts: list[Prompt]) -> None:
    tree = tree_of(prompts)
    by_position = [prompts[index] for index in tree.order.tolist()]
    assert by_position == sorted(prompts)
    assert tree.num_leaves == len(set(prompts))
    assert tree.num_unique_tokens == unique_tokens(prompts)
    inner = set()
    for node in range(tree.num_inner):
        first = tree.leaf_start[tree.first_leaf[node]]
        inner.add(by_position[first][: tree.prefix_len[node]] if prompts else ())
    assert inner == subtree_prefixes(prompts)


@given(
    prompts_strategy.flatmap(lambda prompts: st.tuples(st.just(prompts), st.tuples(*[outputs_strategy] * len(prompts))))
)
def test_aggregates_are_exact(job: tuple[list[Prompt], tuple[int, ...]]) -> None:
    prompts, outputs = job
    tree = tree_of(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    cost = QUADRATIC_COST
    leaves = leaf_costs(tree, cost, cost.compute_s(lengths, outputs), cost.memory_s(lengths, outputs))
    nodes = node_costs(tree, cost, leaves)
    for node in range(tree.num_nodes):
        begin, end = tree.leaf_start[tree.first_leaf[node]], tree.leaf_start[tree.last_leaf[node]]
        expected = node_totals(prompts, outputs, cost, tree.order[begin:end].tolist())
        assert nodes.compute_s[node] == pytest.approx(expected.compute_s)
        assert nodes.memory_s[node] == pytest.approx(expected.memory_s)
        assert nodes.saved_s[node] == pytest.approx(expected.saved_s, abs=1e-9)


@given(prompts_strategy, st.integers(0, 2**14 - 1))
def test_split_leaves_count_for_themselves_and_the_root(prompts: list[Prompt], mask: int) -> None:
    tree = tree_of(prompts)
    outputs = [index % 5 for index in range(len(prompts))]
    lengths = np.array([len(prompt) for prompt in prompts])
    cost = QUADRATIC_COST
    leaves = leaf_costs(tree, cost, cost.compute_s(lengths, outputs), cost.memory_s(lengths, outputs))
    is_kept = np.array([mask >> leaf & 1 for leaf in range(tree.num_leaves)], dtype=np.bool_)
    nodes = node_costs(tree, cost, leaves, is_kept)
    for node in range(1, tree.num_inner):
        kept = [leaf for leaf in range(tree.first_leaf[node], tree.last_leaf[node]) if is_kept[leaf]]
        members = [
            int(index) for leaf in kept for index in tree.order[tree.leaf_start[leaf] : tree.leaf_start[leaf + 1]]
        ]
        expected = node_totals(prompts, outputs, cost, members)
        assert nodes.compute_s[node] == pytest.approx(expected.compute_s)
        assert nodes.saved_s[node] == pytest.approx(expected.saved_s, abs=1e-9)
    assert nodes.compute_s[0] == pytest.approx(float(leaves.compute_s.sum()))


@given(prompts_strategy, st.integers(1, 3))
def test_block_keys_name_contents(prompts: list[Prompt], block_size: int) -> None:
    tree = tree_of(prompts)
    content_by_key: dict[int, Prompt] = {}
    for index, prompt in enumerate(prompts):
        keys = tree.block_keys(index, block_size)
        assert len(keys) == len(prompt) // block_size
        for block, key in enumerate(keys):
            content = prompt[: (block + 1) * block_size]
            assert content_by_key.setdefault(key, content) == content
    assert len(set(content_by_key.values())) == len(content_by_key), "one content, two keys"


@given(prompts_strategy, st.integers(1, 4))
def test_a_tree_in_blocks_shares_whole_blocks_and_keeps_the_leaves(prompts: list[Prompt], block_size: int) -> None:
    tree = tree_of(prompts)
    blocks = tree.in_blocks(block_size)
    blocks.check()
    for name in ("order", "leaf_start", "leaf_of", "leaf_len"):
        assert (getattr(blocks, name) == getattr(tree, name)).all(), name
    assert (blocks.leaf_lcp == tree.leaf_lcp // block_size * block_size).all()
    assert (blocks.prefix_len[: blocks.num_inner] % block_size == 0).all()
    for index in range(len(prompts)):
        assert len(blocks.block_keys(index, block_size)) == len(tree.block_keys(index, block_size))
    contents = {prompt[:end] for prompt in prompts for end in range(block_size, len(prompt) + 1, block_size)}
    assert len({key for index in range(len(prompts)) for key in blocks.block_keys(index, block_size)}) == len(contents)


@given(prompts_strategy, st.integers(0, 2**14 - 1))
def test_restricting_is_building_from_fewer_prompts(prompts: list[Prompt], mask: int) -> None:
    kept = [index for index in range(len(prompts)) if mask >> index & 1]
    restricted = tree_of(prompts).restrict(np.array(kept, dtype=np.int64))
    rebuilt = tree_of([prompts[index] for index in kept])
    for name in ("order", "leaf_start", "leaf_lcp", "parent", "prefix_len", "first_leaf", "last_leaf"):
        assert (getattr(restricted, name) == getattr(rebuilt, name)).all(), name


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_long_prefixes_are_measured_exactly(seed: int) -> None:
    """Longer than a window, at its borders, and at the end of the array."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, 100, 300)
    lengths = rng.choice([0, 1, 63, 64, 65, 127, 128, 129, 192, 300], 12)
    prompts = [tuple(stem[:length].tolist() + rng.integers(0, 3, rng.integers(0, 3)).tolist()) for length in lengths]
    found = sort_prompts(flatten(np.array(prompt, dtype=np.int32) for prompt in prompts))
    ordered = sorted(prompts)
    assert found.lcp.tolist() == [0, *[shared_prefix(*pair) for pair in pairwise(ordered)]]


def test_token_ids_sort_as_numbers() -> None:
    prompts = [(256,), (1,), (2**31 - 1,), (255, 7), (65536,)]
    assert [prompts[index] for index in tree_of(prompts).order] == sorted(prompts)


def test_a_chain_of_10000_nested_prefixes_builds_without_recursion() -> None:
    lengths = np.arange(1, 10_001)
    tree = PrefixTree.from_sorted(np.arange(10_000), np.append(0, lengths[:-1]), lengths)
    tree.check()
    assert tree.num_inner == 10_000  # the root and 9,999 prompts that others go on from
    assert int(tree.level.max()) == 10_000
    assert tree.num_unique_tokens == 10_000
    assert len(tree.block_keys(9_999, 16)) == 625


@pytest.mark.parametrize(
    ("prompts", "num_inner", "sharing"),
    [([], 1, 0.0), ([()], 1, 0.0), ([(1, 2)] * 4, 1, 0.75), ([(1,), (2,), (3,)], 1, 0.0)],
    ids=["empty", "one empty prompt", "all identical", "all distinct"],
)
def test_degenerate_jobs(prompts: list[Prompt], num_inner: int, sharing: float) -> None:
    tree = tree_of(prompts)
    assert tree.num_inner == num_inner
    assert tree.sharing == pytest.approx(sharing)
