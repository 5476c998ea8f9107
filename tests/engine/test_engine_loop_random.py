"""Random work on tiny pools: every request ends once, with the tokens of its dumb sequential twin."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable

import pytest
from engine_scenarios import BLOCK_SIZE, EOS, VOCAB_SIZE, PlannedPolicy, make_loop, make_request, run_checked
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.engine.fake import FakeExecutor, expected_prompt_logprobs, expected_tokens
from blendserve.request import Request, SamplingParams

PREFIXES = [list(range(20)), list(range(9)), [*range(8), *range(40, 56)], [99] * 16]


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """A cut of one of a few shared prefixes, and some tokens of its own (or none)."""
    prefix = draw(st.sampled_from(PREFIXES))
    shared: list[int] = prefix[: draw(st.integers(0, len(prefix)))]
    own = draw(st.lists(st.integers(0, 3), min_size=0 if shared else 1, max_size=7))
    return shared + own


@st.composite
def request_lists(draw: st.DrawFn) -> list[Request]:
    """Requests of up to 27 prompt and 20 output tokens, so that 47 tokens, 12 blocks, hold any one of them."""
    requests = []
    for index in range(draw(st.integers(1, 14))):
        sampling = SamplingParams(
            min_tokens=draw(st.sampled_from([0, 0, 5])),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (3, 4)])),
        )
        requests.append(make_request(index, draw(prompts()), draw(st.integers(0, 20)), sampling))
    return requests


@settings(max_examples=60, deadline=None)
@given(
    requests=request_lists(),
    num_blocks=st.integers(12, 40),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 30),
    budgets=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    preempt_every=st.sampled_from([0, 0, 2, 5]),
    data=st.data(),
)
def test_every_request_ends_once_with_its_twins_tokens(
    requests: list[Request],
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    budgets: list[int],
    preempt_every: int,
    data: st.DataObject,
) -> None:
    order = data.draw(st.permutations(range(len(requests))))
    executor = FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB_SIZE, EOS)
    loop = make_loop(executor, max_num_seqs, max_num_batched_tokens)
    policy = PlannedPolicy(requests, order, seed=num_blocks, budgets=budgets)

    outputs = run_checked(loop, requests, policy, preempt_every=preempt_every)

    assert outputs.keys() == set(range(len(requests)))
    for request in requests:
        assert outputs[request.index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE, EOS)
    assert loop.stats.max_kv_tokens <= num_blocks * BLOCK_SIZE
    assert loop.stats.num_finished == len(requests)
    assert not executor.request_by_slot
    assert max((sum(count for _, _, count in plan) for plan in executor.plans), default=0) <= max_num_batched_tokens


@settings(max_examples=40, deadline=None)
@given(requests=request_lists(), budget=st.integers(1, 40), data=st.data())
def test_a_shared_block_is_computed_once_where_memory_suffices(
    requests: list[Request], budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(requests))))
    executor = FakeExecutor(num_blocks=12 * len(requests), block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE)
    loop = make_loop(executor, max_num_seqs=14, max_num_batched_tokens=40)

    run_checked(loop, requests, PlannedPolicy(requests, order, budgets=[budget]))

    computed: Counter[tuple[Hashable, int]] = Counter()
    for index, begin, count in (entry for plan in executor.plans for entry in plan):
        request = requests[index]
        # The block of the last prompt token is always computed, whoever else has it.
        end = min(begin + count, (request.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE)
        computed.update((request.block_keys[t // BLOCK_SIZE], t % BLOCK_SIZE) for t in range(begin, end))
    assert not [key for key, times in computed.items() if times > 1]


@pytest.mark.parametrize("seed", range(6))
def test_a_busy_engine_with_growing_sequences(seed: int) -> None:
    chooser = random.Random(seed)
    requests = []
    for index in range(60):
        prefix = chooser.choice(PREFIXES)
        own = [chooser.randrange(3) for _ in range(chooser.randrange(1, 9))]
        tokens = prefix[: chooser.randrange(len(prefix))] + own
        requests.append(make_request(index, tokens, chooser.randrange(1, 20), SamplingParams(ignore_eos=True)))
    order = chooser.sample(range(60), 60)
    executor = FakeExecutor(chooser.randrange(12, 60), BLOCK_SIZE, VOCAB_SIZE, EOS)
    loop = make_loop(executor, max_num_seqs=10, max_num_batched_tokens=24)

    outputs = run_checked(loop, requests, PlannedPolicy(requests, order, seed, budgets=[24, 24, 5, 1]), preempt_every=9)

    for request in requests:
        assert outputs[request.index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)
    assert loop.stats.num_preemptions > 0
    num_tokens = [sum(count for _, _, count in plan) for plan in executor.plans]
    assert max(num_tokens) == 24
    assert min(num_tokens) > 0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(prompts(), min_size=1, max_size=14),
    num_blocks=st.integers(12, 40),
    budgets=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    preempt_every=st.sampled_from([0, 2, 5]),
    data=st.data(),
)
def test_scores_of_a_prompt_are_its_own_whoever_computed_its_prefix(
    prompts: list[list[int]], num_blocks: int, budgets: list[int], preempt_every: int, data: st.DataObject
) -> None:
    """Some requests ask for scores, of one kind or another, some write, and some only read: all share prefixes."""
    requests = []
    for index, tokens in enumerate(prompts):
        sampling = SamplingParams(prompt_logprobs=data.draw(st.sampled_from([None, 0, 0, 3])), ignore_eos=True)
        requests.append(make_request(index, tokens, data.draw(st.sampled_from([0, 0, 12])), sampling))
    executor = FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB_SIZE, EOS)
    policy = PlannedPolicy(requests, data.draw(st.permutations(range(len(requests)))), budgets=budgets)

    outputs = run_checked(make_loop(executor, 5, 20), requests, policy, preempt_every=preempt_every)

    for request in requests:
        output = outputs[request.index]
        assert output.token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)
        is_scored = request.sampling.prompt_logprobs is not None
        assert output.prompt_logprobs == (expected_prompt_logprobs(request) if is_scored else None)


def test_requests_that_are_scored_compute_what_they_share_once() -> None:
    scored = SamplingParams(prompt_logprobs=1)
    requests = [make_request(index, [*range(16), 20 + index], 0, scored) for index in range(5)]
    executor = FakeExecutor(60, BLOCK_SIZE, VOCAB_SIZE)
    outputs = run_checked(make_loop(executor), requests, PlannedPolicy(requests, range(5)))
    assert sum(count for plan in executor.plans for _, _, count in plan) == 16 + 5
    assert [outputs[index].num_cached_tokens for index in range(5)] == [0, 16, 16, 16, 16]
