"""What the requests inside vLLM are taken for, against a step-by-step twin, and whom it lets in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blendserve.engine.planned import plan_requests
from blendserve.engines.estimates import remote_cost
from blendserve.engines.vllm.api import VllmLimits
from blendserve.engines.vllm.counters import VllmCounters
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.engines.vllm.inflight import VllmInflight
from blendserve.engines.vllm.queue import index_of
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.sorting import flatten


def random_plan(seed: int, num_requests: int, *, is_shared: bool = True) -> tuple[Plan, list[list[int]]]:
    """Known output lengths, so that whatever differs from the engine is a fault of the window."""
    source = random.Random(seed)
    letters = 2 if is_shared else 200
    prompts = [[source.randrange(letters) for _ in range(source.randrange(1, 200))] for _ in range(num_requests)]
    if is_shared:
        prompts = [[7] * 70 + prompt if source.random() < 0.5 else prompt for prompt in prompts]
    outputs = np.array([source.randrange(1, 120) for _ in prompts], np.int64)
    table = RequestTable(np.array([len(prompt) for prompt in prompts], np.int64), outputs, outputs)
    return plan_requests(flatten([np.array(prompt, np.int32) for prompt in prompts]), table, remote_cost()), prompts


def add(engine: Any, api: FakeVllm, plan: Plan, prompts: list[list[int]], index: int) -> None:
    params = api.sampling_params(None, max_tokens=int(plan.table.max_output_tokens[index]), ignore_eos=True)
    engine.add_request(str(index), api.tokens_prompt(prompts[index]), params)


@settings(max_examples=40, deadline=None)
@example(seed=8710, num_requests=9, num_blocks=40, max_num_seqs=6, policy="fcfs")  # a planned prefix is not there yet
@given(
    seed=st.integers(0, 10**6),
    num_requests=st.integers(1, 30),
    num_blocks=st.sampled_from([13, 40, 200]),
    max_num_seqs=st.integers(1, 9),
    policy=st.sampled_from(POLICY_NAMES),
)
def test_each_request_enters_once_and_is_never_preempted(
    seed: int, num_requests: int, num_blocks: int, max_num_seqs: int, policy: str
) -> None:
    plan, prompts = random_plan(seed, num_requests)
    api, counters = FakeVllm(num_blocks=num_blocks, max_num_seqs=max_num_seqs), VllmCounters()
    engine = api.open_engine({}, counters)
    inflight = VllmInflight(plan, make_policy(policy, plan), VllmLimits.of(engine), max_num_seqs)
    seen = []
    while inflight.num_left:
        for index in inflight.admit(counters.kv_use):
            seen.append(index)
            add(engine, api, plan, prompts, index)
        inflight.check()
        num_hits = counters.num_hit_tokens
        ended = engine.step()
        inflight.advance(counters.num_hit_tokens - num_hits)
        inflight.check()
        for output in ended:
            inflight.finish(int(output.request_id), len(output.outputs[0].token_ids))
    assert sorted(seen) == list(range(num_requests))
    if policy == "fcfs":  # lengths are known, so what enters fits until its end
        assert counters.num_preemptions == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_estimated_progress_is_that_of_the_engine(seed: int) -> None:
    """Where no prefix is shared and nothing is preempted, the window knows all that the engine knows."""
    plan, prompts = random_plan(seed, 20, is_shared=False)
    api, counters = FakeVllm(num_blocks=400, max_num_seqs=6, max_num_batched_tokens=64), VllmCounters()
    engine = api.open_engine({}, counters)
    inflight = VllmInflight(plan, make_policy("fcfs", plan), VllmLimits.of(engine), 6)
    num_sampled = num_output = 0
    while inflight.num_left:
        for index in inflight.admit(counters.kv_use):
            add(engine, api, plan, prompts, index)
        before = sum(request.num_computed_tokens for request in engine.scheduler.running)
        ended = engine.step()
        load = inflight.advance(0)
        num_sampled += load.num_sampled_tokens
        for output in ended:
            num_output += len(output.outputs[0].token_ids)
            inflight.finish(int(output.request_id), len(output.outputs[0].token_ids))
        running = engine.scheduler.running
        by_index = {index_of(request): request for request in running}
        inside = [index for index in inflight.request_index.tolist() if index in by_index]
        assert len(inside) == len(running)
        for index, computed, output_tokens in zip(
            inflight.request_index.tolist(), inflight.num_computed_tokens, inflight.num_output_tokens, strict=True
        ):
            if index in by_index:
                assert computed == by_index[index].num_computed_tokens
                assert output_tokens == by_index[index].num_output_tokens
        after = sum(request.num_computed_tokens for request in running)
        if not ended:
            assert after - before == load.num_prefill_tokens + load.num_decode_tokens
    assert num_sampled == num_output


def test_a_preempted_request_computes_everything_again() -> None:
    plan, _ = random_plan(1, 6, is_shared=False)
    limits = VllmLimits(num_blocks=400, block_size=32, max_num_seqs=6, max_num_batched_tokens=2048)
    inflight = VllmInflight(plan, make_policy("fcfs", plan), limits, 6)
    inflight.admit(0.0)
    inflight.advance(0)
    inflight.advance(0)
    before = inflight.num_output_tokens.copy()
    held = inflight.free_tokens
    inflight.preempt(2)
    inflight.check()
    assert inflight.num_computed_tokens.tolist()[-2:] == [0, 0]
    assert (inflight.num_computed_tokens[:-2] > 0).all()
    assert inflight.free_tokens < held  # it will take its memory again
    load = inflight.advance(0)
    assert load.num_prefill_tokens >= int((inflight.num_prompt_tokens[-2:] + before[-2:]).sum())


def test_capacity_leaves_out_the_empty_block() -> None:
    engine = FakeVllm(num_blocks=65, block_size=32).open_engine({}, VllmCounters())
    assert VllmLimits.of(engine).capacity_tokens == 64 * 32
