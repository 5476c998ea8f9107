"""Requests in flight at a server: whom a policy sees, and that it lets each in once and never too many."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.engine.planned import plan_requests
from blendserve.engines.estimates import planned_cached_tokens, remote_cost, tokens_of_bytes
from blendserve.engines.http.inflight import HttpInflight
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.sorting import flatten
from blendserve.planner.tree import PrefixTree


def plan_of(prompts: list[list[int]], max_output_tokens: list[int]) -> Plan:
    table = RequestTable(
        np.array([len(prompt) for prompt in prompts], np.int64),
        np.array(max_output_tokens, np.int64),
        np.full(len(prompts), -1, np.int64),
    )
    return plan_requests(flatten([np.array(prompt, np.int32) for prompt in prompts]), table, remote_cost())


def random_plan(seed: int, num_requests: int) -> Plan:
    source = random.Random(seed)
    prompts = [[source.randrange(3) for _ in range(source.randrange(1, 60))] for _ in range(num_requests)]
    return plan_of(prompts, [source.randrange(1, 400) for _ in prompts])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_requests=st.integers(1, 40),
    max_inflight=st.integers(1, 9),
    kv_tokens=st.sampled_from([0, 1, 300, 3000]),
    policy=st.sampled_from(POLICY_NAMES),
)
def test_each_request_enters_once_and_none_starves(
    seed: int, num_requests: int, max_inflight: int, kv_tokens: int, policy: str
) -> None:
    plan = random_plan(seed, num_requests)
    inflight = HttpInflight(plan, make_policy(policy, plan), max_inflight=max_inflight, kv_tokens=kv_tokens)
    source = random.Random(seed)
    size = plan.table.num_prompt_tokens + plan.expected_output_tokens
    inside: list[int] = []
    seen: list[int] = []
    now_s = 0.0
    while inflight.num_waiting or inside:
        admitted = inflight.admit(now_s)
        inside += admitted
        seen += admitted
        inflight.check()
        assert inside, "an empty window takes someone in"
        assert len(inside) == inflight.num_running <= max_inflight
        if kv_tokens and len(inside) > 1:
            assert size[inside].sum() <= kv_tokens + 1e-6
        assert set(inflight.request_index.tolist()) == set(inside)
        assert (inflight.num_computed_tokens <= inflight.num_prompt_tokens + inflight.num_output_tokens).all()
        assert 0 <= inflight.kv_use <= 1
        now_s += source.random() * 3
        leaving = inside.pop(source.randrange(len(inside)))
        inflight.finish(leaving, source.choice([0, 1, 50]), now_s)
    assert sorted(seen) == list(range(num_requests))
    assert inflight.max_running <= max_inflight


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_window_is_kept_full(policy: str) -> None:
    plan = random_plan(3, 60)
    inflight = HttpInflight(plan, make_policy(policy, plan), max_inflight=6)
    inside = inflight.admit(0.0)
    fill = [len(inside)]
    now_s = 1.0
    while inflight.num_waiting:
        inflight.finish(inside.pop(0), 20, now_s)
        inside += inflight.admit(now_s)
        fill.append(len(inside))
        now_s += 0.2
    assert np.mean(fill) >= 5, fill


def test_outputs_grow_at_the_rate_of_what_has_finished() -> None:
    plan = plan_of([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [100, 100, 30])
    inflight = HttpInflight(plan, make_policy("fcfs", plan), max_inflight=3)
    inflight.admit(0.0)
    assert inflight.num_output_tokens.tolist() == [0, 0, 0]
    inflight.finish(0, 50, 10.0)
    inflight.admit(12.0)
    outputs = dict(zip(inflight.request_index.tolist(), inflight.num_output_tokens.tolist(), strict=True))
    assert outputs == {1: 60, 2: 29}, "five a second, and never the last token of those allowed"


def test_planned_sharing_is_what_neighbours_share() -> None:
    prompts = [[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 4], [5]]
    tree = PrefixTree.from_flat(flatten([np.array(prompt, np.int32) for prompt in prompts]))
    assert planned_cached_tokens(tree).tolist() == [0, 2, 3, 0]


def test_bytes_stand_for_tokens_where_there_is_no_tokenizer() -> None:
    first, second = tokens_of_bytes("the same words, then A"), tokens_of_bytes("the same words, then B ü")
    assert len(first) == -(-22 // 4)
    assert (first[:5] == second[:5]).all()
    assert first[5] != second[5]
    assert (tokens_of_bytes("\U0010ffff" * 9) >= 0).all()
