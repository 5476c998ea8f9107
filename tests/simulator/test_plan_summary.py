"""What a plan says of a job, against walks over all prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import Prompt, subtree_prefixes, unique_tokens
from planner_cases import plan_of, prompts_strategy

from blendserve.planner.sorting import flatten
from blendserve.request import TokenIds
from blendserve.simulator.plan_summary import (
    END_SHARE_OF_WORK,
    LengthSummary,
    find_ends,
    one_line,
    requests_by_node,
    saved_tokens,
    summarize_plan,
)


def words(token_ids: TokenIds) -> str:
    return " ".join(map(str, token_ids.tolist()))


def saved_by_walk(prompts: list[Prompt]) -> dict[Prompt, int]:
    """Tokens saved by the part of every shared prefix that no longer one holds, by the prefix."""
    nodes = subtree_prefixes(prompts) | set(prompts)
    saved = {}
    for node in nodes:
        above = max(
            (len(other) for other in nodes if len(other) < len(node) and node[: len(other)] == other), default=0
        )
        count = sum(prompt[: len(node)] == node for prompt in prompts)
        saved[node] = (len(node) - above) * (count - 1)
    return saved


@given(prompts_strategy.filter(lambda prompts: sum(map(len, prompts)) > 0))
def test_savings_of_all_nodes_are_those_of_a_walk(prompts: list[Prompt]) -> None:
    plan = plan_of(prompts, [1] * len(prompts))
    saved = saved_tokens(plan)
    assert saved.sum() == sum(map(len, prompts)) - unique_tokens(prompts)
    assert sorted(value for value in saved.tolist() if value) == sorted(filter(None, saved_by_walk(prompts).values()))
    assert requests_by_node(plan)[0] == len(prompts)


def test_listed_prefixes_carry_their_requests_and_words() -> None:
    long, short = (1, 2, 3, 4, 5), (1, 2)
    prompts: list[Prompt] = [(*long, 9), (*long, 8), (*long, 7), (*short, 6), (50, 51), (50, 51)]
    plan = plan_of(prompts, [1] * 6)
    summary = summarize_plan(plan, flatten(np.array(prompt, np.int32) for prompt in prompts), words)
    first, second, third = summary.prefixes
    assert (first.num_saved_tokens, second.num_saved_tokens, third.num_saved_tokens) == (6, 6, 2)
    by_length = {prefix.num_prefix_tokens: prefix for prefix in (first, second)}
    assert (by_length[5].num_requests, by_length[5].num_own_tokens, by_length[5].text) == (3, 3, "… 3 4 5")
    assert (by_length[2].num_requests, by_length[2].text) == (4, "1 2")
    assert (third.num_requests, third.is_whole_prompt, third.text) == (2, True, "50 51")
    assert summary.num_distinct_prompts == 5
    assert summary.optimal_sharing == pytest.approx(14 / sum(map(len, prompts)))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=30))
def test_ends_hold_a_tenth_of_the_work(pairs: list[tuple[int, int]]) -> None:
    prompts: list[Prompt] = [tuple(range(100 * index, 100 * index + length)) for index, (length, _) in enumerate(pairs)]
    plan = plan_of(prompts, [output for _, output in pairs])
    compute_end, memory_end = find_ends(plan)
    work = (plan.schedule.compute_s + plan.schedule.memory_s)[plan.schedule.order]
    limit = END_SHARE_OF_WORK * work.sum() * (1 + 1e-9)
    for end, in_order in ((compute_end, work), (memory_end, work[::-1])):
        assert end.num_requests >= 1
        assert in_order[: end.num_requests - 1].sum() <= limit
    first = plan.schedule.order[: compute_end.num_requests]
    assert compute_end.mean_prompt_tokens == pytest.approx(np.mean([len(prompts[index]) for index in first]))
    assert compute_end.density >= memory_end.density * (1 - 1e-9)


def test_summary_adds_up() -> None:
    prompts: list[Prompt] = [(1, 2, 3), (1, 2), (4,)]
    summary = summarize_plan(plan_of(prompts, [5, 0, 7]), flatten(np.array(p, np.int32) for p in prompts), words)
    assert summary.num_known_outputs == summary.num_requests == 3
    assert summary.prompt_tokens == 6
    assert summary.expected_output_tokens == 12
    assert summary.root_density == pytest.approx(summary.compute_s / summary.memory_s)
    assert summary.prompts == LengthSummary(1, 2, 3, 3, 2.0)


def test_text_is_one_short_line() -> None:
    assert one_line("a\n\tb \x00\x1b[31m c", 80) == "a b [31m c"
    assert one_line("x" * 100, 10) == "x" * 9 + "…"
