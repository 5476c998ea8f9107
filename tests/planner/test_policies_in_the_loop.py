"""Every policy in the real engine loop, with its block pool and prefix cache: all requests end once, and right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from engine_scenarios import BLOCK_SIZE, EOS, VOCAB_SIZE, make_loop, make_request, run_checked
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import COST

from blendserve.engine.fake import FakeExecutor, expected_tokens
from blendserve.errors import CapacityError
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import make_plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window, WindowedPolicy
from blendserve.request import Request, SamplingParams

STEMS = ((), tuple(range(13)), (*range(8), 20, 21, 22, 23, 24))


@st.composite
def jobs(draw: st.DrawFn) -> list[Request]:
    """Prompts of one to twenty tokens, some of them nested or equal; answers of no to sixteen, which may end early."""
    requests = []
    for index in range(draw(st.integers(1, 12))):
        stem = draw(st.sampled_from(STEMS))
        own = draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))
        sampling = SamplingParams(ignore_eos=draw(st.booleans()))
        prompt = [*stem[: draw(st.integers(0, len(stem)))], *own]
        requests.append(make_request(index, prompt, draw(st.integers(0, 16)), sampling))
    return requests


def table_of(requests: list[Request]) -> RequestTable:
    return request_table(
        (request.num_prompt_tokens for request in requests),
        ((request.sampling, request.max_output_tokens) for request in requests),
    )


def keyed(requests: list[Request], tree: PrefixTree) -> list[Request]:
    """The requests with the tree's names for their blocks."""
    return [replace(request, block_keys=tree.block_keys(request.index, BLOCK_SIZE)) for request in requests]


def windows_of(requests: list[Request], size: int) -> Iterator[Window]:
    for begin in range(0, len(requests), size):
        part = requests[begin : begin + size]
        yield Window(flatten(request.prompt_token_ids for request in part), table_of(part))


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=25, deadline=None)
@given(jobs(), st.integers(10, 40), st.integers(1, 6), st.integers(6, 30), st.sampled_from([0, 1, 4]), st.booleans())
def test_every_policy_serves_every_request_once(
    name: str,
    requests: list[Request],
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    window: int,
    is_disturbed: bool,
) -> None:
    """Under any memory that holds the largest request, planned as a whole or in windows, with preemptions forced."""
    executor = FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB_SIZE, EOS)
    loop = make_loop(executor, max_num_seqs, max_num_batched_tokens)
    if window:
        policy = WindowedPolicy(windows_of(requests, window), COST, lambda plan: make_policy(name, plan))
        outputs = run_checked(loop, requests, policy, preempt_every=3 * is_disturbed)
    else:
        tree = PrefixTree.from_prompts(request.prompt_token_ids for request in requests)
        plan = make_plan(tree, table_of(requests), COST, block_size=BLOCK_SIZE)
        outputs = run_checked(loop, keyed(requests, plan.tree), make_policy(name, plan), preempt_every=3 * is_disturbed)
    assert outputs.keys() == set(range(len(requests)))
    for request in requests:
        assert outputs[request.index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE, EOS)
    assert loop.stats.max_kv_tokens <= num_blocks * BLOCK_SIZE


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_requests_that_can_never_run_stop_nobody(name: str) -> None:
    """All are refused by an idle engine, one after the other, and together they are more than a step holds."""
    requests = [make_request(i, [i] * 50, 1, SamplingParams(ignore_eos=True)) for i in range(6)]
    tree = PrefixTree.from_prompts(request.prompt_token_ids for request in requests)
    loop = make_loop(FakeExecutor(10, BLOCK_SIZE, VOCAB_SIZE, EOS), max_num_seqs=4, max_num_batched_tokens=64)
    plan = make_plan(tree, table_of(requests), COST, block_size=BLOCK_SIZE)
    outputs = list(loop.run(keyed(requests, plan.tree), make_policy(name, plan)))
    assert sorted(output.index for output in outputs) == list(range(6))
    assert all(isinstance(output.error, CapacityError) for output in outputs)


def test_a_prefix_that_all_share_is_held_once() -> None:
    """Questions on one document that fills half of the memory: they run together all the same."""
    requests = [make_request(i, [*range(60), 60 + i], 4, SamplingParams(ignore_eos=True)) for i in range(20)]
    tree = PrefixTree.from_prompts(request.prompt_token_ids for request in requests)
    loop = make_loop(FakeExecutor(31, BLOCK_SIZE, VOCAB_SIZE, EOS), max_num_seqs=16, max_num_batched_tokens=64)
    plan = make_plan(tree, table_of(requests), COST, block_size=BLOCK_SIZE)
    outputs = list(loop.run(keyed(requests, plan.tree), make_policy("blend", plan)))
    assert len(outputs) == 20
    assert loop.stats.num_steps < 30, "80 tokens, one by one"


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_chain_of_nested_prompts_is_computed_once_by_every_policy(name: str) -> None:
    """Prompts of 1 to 400 tokens, each the beginning of the next: whole blocks are computed once, in any order."""
    requests = [make_request(i, [5] * (i + 1), 1, SamplingParams(ignore_eos=True)) for i in range(400)]
    tree = PrefixTree.from_prompts(request.prompt_token_ids for request in requests)
    executor = FakeExecutor(1000, BLOCK_SIZE, VOCAB_SIZE, EOS)
    loop = make_loop(executor, max_num_seqs=8, max_num_batched_tokens=64)
    plan = make_plan(tree, table_of(requests), COST, block_size=BLOCK_SIZE)
    outputs = list(loop.run(keyed(requests, plan.tree), make_policy(name, plan)))
    assert sorted(output.index for output in outputs) == list(range(400))
    own = sum((i % BLOCK_SIZE) + 1 for i in range(400))  # the block of the last token is always computed
    assert loop.stats.num_prefill_tokens <= 400 + own
    assert np.all([output.num_cached_tokens % BLOCK_SIZE == 0 for output in outputs])
