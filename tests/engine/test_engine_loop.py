"""The engine loop on small fixed cases: golden schedules, sharing inside a step, limits, errors, early ends."""

from __future__ import annotations

import numpy as np
import pytest
from engine_scenarios import BLOCK_SIZE, EOS, VOCAB_SIZE, PlannedPolicy, make_loop, make_request, run_checked

from blendserve.config import EngineConfig
from blendserve.engine.fake import FakeExecutor, FakeSimulator, FifoPolicy, expected_tokens
from blendserve.engine.loop import EngineLoop
from blendserve.engine.stats import RunStats
from blendserve.errors import CapacityError, ExecutorError, RequestError
from blendserve.planner.base import Proposal
from blendserve.request import Request, SamplingParams, SequenceOutput


def fake(num_blocks: int = 64, **options: int) -> FakeExecutor:
    return FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB_SIZE, (), **options)


def test_golden_schedule_decodes_first_and_prefills_in_chunks() -> None:
    executor = fake()
    requests = [make_request(0, range(5), 3), make_request(1, range(30, 42), 2), make_request(2, range(60, 63), 2)]
    run_checked(make_loop(executor, max_num_batched_tokens=8), requests, FifoPolicy(3))
    assert executor.plans == [
        ((0, 0, 5), (1, 0, 3)),
        ((0, 5, 1), (1, 3, 7)),
        ((0, 6, 1), (1, 10, 2), (2, 0, 3)),
        ((1, 12, 1), (2, 3, 1)),
    ]


def test_golden_schedule_of_a_shared_prefix_inside_one_step() -> None:
    executor = fake()
    shared = range(8)
    requests = [make_request(i, [*shared, 20 + i, 30 + i], 2) for i in range(3)]
    outputs = run_checked(make_loop(executor, max_num_batched_tokens=32), requests, FifoPolicy(3))
    assert executor.plans == [
        ((0, 0, 10), (1, 8, 2), (2, 8, 2)),
        ((0, 10, 1), (1, 10, 1), (2, 10, 1)),
    ]
    assert [outputs[i].num_cached_tokens for i in range(3)] == [0, 8, 8]


def test_a_request_waits_for_its_prefix_while_others_go_on() -> None:
    executor = fake()
    requests = [make_request(0, range(12), 1), make_request(1, [*range(8), 50], 1), make_request(2, range(70, 73), 1)]
    loop = make_loop(executor, max_num_batched_tokens=16)
    run_checked(loop, requests, PlannedPolicy(requests, [0, 1, 2], seed=1, budgets=[7]))
    assert executor.plans == [((0, 0, 7),), ((0, 7, 5), (1, 8, 1), (2, 0, 1)), ((2, 1, 2),)]


def test_waiting_for_a_prefix_does_not_block_those_behind() -> None:
    executor = fake()
    requests = [make_request(0, range(12), 1), make_request(1, [*range(8), 50], 1), make_request(2, range(70, 73), 1)]
    loop = make_loop(executor, max_num_batched_tokens=16)
    loop.begin(requests, FifoPolicy(3))
    loop._admit(FifoPolicy(3))
    schedule = loop.batcher.plan(7)
    assert schedule.plan.num_prefill_tokens == 7
    rows, chunks = loop.batcher._prefill_chunks([1, 2], 7)  # as if the owner of the prefix were not scheduled
    assert (rows, chunks) == ([2], [3])


def test_a_prompt_that_is_cached_whole_recomputes_its_last_block_apart() -> None:
    executor = fake()
    requests = [make_request(i, range(8), 3, seed=5) for i in range(3)]
    outputs = run_checked(make_loop(executor, max_num_seqs=3), requests, FifoPolicy(3))
    assert executor.plans[0] == ((0, 0, 8), (1, 4, 4), (2, 4, 4))
    assert [outputs[i].num_cached_tokens for i in range(3)] == [0, 4, 4]
    assert len({tuple(outputs[i].token_ids.tolist()) for i in range(3)}) == 1


def test_prefix_caching_can_be_switched_off() -> None:
    executor = fake()
    loop = EngineLoop(executor, EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, enable_prefix_caching=False))
    run_checked(loop, [make_request(i, range(9), 1) for i in range(2)], FifoPolicy(2))
    assert executor.plans == [((0, 0, 9), (1, 0, 9))]
    assert loop.stats.num_cached_tokens == 0


def test_preemption_takes_the_request_that_loses_least_and_keeps_its_tokens() -> None:
    executor = fake(num_blocks=6)
    requests = [make_request(0, range(8), 12), make_request(1, range(40, 44), 8)]
    policy = PlannedPolicy(requests, [0, 1], budgets=[16])
    loop = make_loop(executor)
    outputs = run_checked(loop, requests, policy)
    assert [entry for entry in policy.log if entry[0] == "preempted"] == [("preempted", 1)]
    for request in requests:
        assert outputs[request.index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)
    assert loop.stats.num_preemptions == 1
    assert loop.stats.num_admissions == 3


def test_preempted_requests_do_not_thrash() -> None:
    requests = [make_request(i, [i] * (5 + i % 7), 20 + i * 7 % 40) for i in range(60)]
    loop = EngineLoop(FakeSimulator(100, BLOCK_SIZE), EngineConfig(max_num_seqs=16, max_num_batched_tokens=64))
    outputs = run_checked(loop, requests, FifoPolicy(60))
    assert outputs.keys() == set(range(60))
    assert loop.stats.num_preemptions <= 30  # 77 where an admission may take the last block


def test_a_policy_that_grants_no_prefill_cannot_stop_the_engine() -> None:
    requests = [make_request(i, range(20), 3) for i in range(4)]
    loop = make_loop(fake())
    assert len(run_checked(loop, requests, PlannedPolicy(requests, range(4), budgets=[0]), max_steps=50)) == 4


def test_preempting_the_owner_of_a_pending_prefix_preempts_those_who_wait_for_it() -> None:
    executor = fake()
    tails = [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [9]]
    requests = [make_request(i, [*range(50, 62), *tail, 20 + i], 3) for i, tail in enumerate(tails)]
    loop = make_loop(executor)
    policy = PlannedPolicy(requests, [0, 1, 2, 3], seed=1, budgets=[5])
    loop.begin(requests, policy)
    loop.step()
    assert loop.batcher.table.request_index.tolist() == [0, 1, 2, 3]
    loop.preempt(0)
    loop.check()
    assert loop.batcher.table.num_running == 0
    assert [index for event, index in policy.log if event == "preempted"] == [3, 2, 1, 0]
    outputs: dict[int, SequenceOutput] = {}
    while loop.has_work:
        outputs |= {output.index: output for output in loop.step()}
        loop.check()
    assert all(outputs[r.index].token_ids.tolist() == expected_tokens(r, VOCAB_SIZE) for r in requests)


def test_requests_that_outgrow_the_memory_fail_when_they_do_and_spare_the_others() -> None:
    requests = [make_request(i, range(10 + i, 14 + i), 60 if i % 3 == 0 else 30) for i in range(9)]
    loop = make_loop(fake(num_blocks=10))
    outputs = run_checked(loop, requests, FifoPolicy(9))
    assert loop.stats.num_preemptions > 0
    for request in requests:
        output = outputs[request.index]
        if request.max_output_tokens == 60:
            assert isinstance(output.error, CapacityError)
        else:
            assert output.token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)


def test_a_prompt_larger_than_the_memory_is_refused() -> None:
    loop = make_loop(fake(num_blocks=10))
    outputs = run_checked(loop, [make_request(0, range(41), 1), make_request(1, range(3), 1)], FifoPolicy(2))
    assert "needs KV memory for 41 tokens" in str(outputs[0].error)
    assert outputs[1].finish_reason == "length"


def test_a_request_that_outgrows_the_memory_is_an_error_output_and_the_run_goes_on() -> None:
    requests = [make_request(0, range(10), 40), make_request(1, range(10), 3), make_request(2, [], 3)]
    loop = make_loop(fake(num_blocks=10))
    outputs = run_checked(loop, requests, FifoPolicy(3))
    error = outputs[0].error
    assert outputs[0].finish_reason == "error"
    assert isinstance(error, CapacityError)
    assert "needs KV memory for 41 tokens" in str(error)
    assert "there is room for 40" in str(error)
    assert "--kv-memory" in str(error)
    assert outputs[1].finish_reason == "length"
    assert isinstance(outputs[2].error, RequestError)
    assert loop.stats.num_errors == 2


def test_one_request_may_fill_the_whole_pool() -> None:
    executor = fake(num_blocks=10)
    request = make_request(0, range(10), 31)  # the last token needs no KV: 40 tokens
    loop = make_loop(executor, max_num_seqs=1)
    outputs = run_checked(loop, [request, make_request(1, range(40), 1)], FifoPolicy(2))
    assert outputs[0].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)
    assert loop.stats.max_kv_tokens == 40


def test_block_tables_widen_for_long_prompts_and_long_outputs() -> None:
    requests = [make_request(0, range(3), 400), make_request(1, [i % 9 for i in range(700)], 5)]
    loop = make_loop(fake(num_blocks=300), max_num_batched_tokens=512)
    outputs = run_checked(loop, requests, PlannedPolicy(requests, [0, 1]))
    for request in requests:
        assert outputs[request.index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE)


def test_a_prompt_beyond_the_context_is_an_error_and_outputs_end_with_it() -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=12)
    loop = EngineLoop(fake(), config)
    outputs = run_checked(loop, [make_request(0, range(12), 5), make_request(1, range(11), 5)], FifoPolicy(2))
    assert isinstance(outputs[0].error, RequestError)
    assert outputs[0].error.code == "context_length_exceeded"
    assert len(outputs[1].token_ids) == 1
    assert outputs[1].finish_reason == "length"


def test_no_output_asked_for_ends_after_prefill() -> None:
    executor = fake()
    outputs = run_checked(
        make_loop(executor), [make_request(0, range(20), 0), make_request(1, range(3), 1)], FifoPolicy(2)
    )
    assert executor.plans == [((0, 0, 16),), ((0, 16, 4), (1, 0, 3))]
    assert len(outputs[0].token_ids) == 0
    assert outputs[0].finish_reason == "length"


def test_stop_rules_and_their_reasons() -> None:
    twin = expected_tokens(make_request(0, range(5), 30), VOCAB_SIZE)
    third, fourth = twin[2], twin[3]
    assert third not in twin[:2]
    assert fourth not in twin[:3]

    def stop_checker(request: Request, token_ids: np.ndarray) -> str | None:
        return request.sampling.stop[0] if fourth in token_ids else None

    samplings = [
        SamplingParams(),
        SamplingParams(ignore_eos=True, stop_token_ids=(fourth,)),
        SamplingParams(ignore_eos=True, stop=("END",)),
        SamplingParams(ignore_eos=True),
        SamplingParams(min_tokens=4, stop_token_ids=(fourth,)),
        SamplingParams(min_tokens=3),
    ]
    requests = [make_request(i, range(5), 6, sampling, seed=0) for i, sampling in enumerate(samplings)]
    executor = FakeExecutor(64, BLOCK_SIZE, VOCAB_SIZE, (third,))
    loop = EngineLoop(executor, EngineConfig(max_num_seqs=8, max_num_batched_tokens=64), stop_checker=stop_checker)
    outputs = run_checked(loop, requests, FifoPolicy(6))
    ends = [(len(o.token_ids), o.finish_reason, o.stop_reason) for _, o in sorted(outputs.items())]
    assert ends == [
        (3, "stop", None),
        (4, "stop", fourth),
        (4, "stop", "END"),
        (6, "length", None),
        (4, "stop", fourth),
        (3, "stop", None),
    ]
    assert all(output.token_ids.tolist() == twin[: len(output.token_ids)] for output in outputs.values())


def test_logprobs_are_collected_across_a_preemption() -> None:
    requests = [make_request(i, [i] * 9, 30, SamplingParams(logprobs=0)) for i in range(3)]
    loop = make_loop(fake(num_blocks=14))
    outputs = run_checked(loop, requests, FifoPolicy(3))
    assert loop.stats.num_preemptions > 0
    for output in outputs.values():
        assert [logprob.token_id for logprob in output.logprobs] == output.token_ids.tolist()
        assert [logprob.logprob for logprob in output.logprobs] == [-float(9 + i) for i in range(30)]


def test_an_executor_error_ends_the_run_after_what_had_ended() -> None:
    executor = fake(fails_at_step=3)
    loop = make_loop(executor)
    assert indices_until_error(loop, [make_request(0, range(4), 2), make_request(1, range(4), 9)]) == [0]
    assert loop.batcher.pool.num_free == 64
    assert not executor.request_by_slot


def indices_until_error(loop: EngineLoop, requests: list[Request]) -> list[int]:
    """Run into the executor's error; returns who ended before."""
    indices: list[int] = []
    with pytest.raises(ExecutorError, match="fails on purpose"):
        indices.extend(output.index for output in loop.run(requests, FifoPolicy(len(requests))))
    return indices


def test_error_outputs_of_the_failing_step_are_still_yielded() -> None:
    requests = [make_request(0, range(4), 9), make_request(1, [], 1)]
    assert indices_until_error(make_loop(fake(fails_at_step=0)), requests) == [1]


def test_a_consumer_that_stops_early_leaves_nothing_behind() -> None:
    executor = fake()
    requests = [make_request(i, range(9), 3 + i) for i in range(5)]
    loop = make_loop(executor)
    iterator = loop.run(requests, FifoPolicy(5))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    loop.check()
    assert loop.batcher.pool.num_free == 64
    assert not executor.request_by_slot
    assert not loop.has_work
    assert len(list(loop.run(requests, FifoPolicy(5)))) == 5


def test_another_run_ends_the_one_before() -> None:
    requests = [make_request(i, range(9), 3 + i) for i in range(5)]
    loop = make_loop(fake())
    first, second = (loop.run(requests, FifoPolicy(5)) for _ in range(2))
    next(first)
    seen = [next(second).index]
    assert list(first) == []
    seen += [output.index for output in second]
    assert sorted(seen) == list(range(5))


def test_close_closes_the_executor() -> None:
    executor = fake()
    with make_loop(executor) as loop:
        loop.begin([make_request(0, range(9), 30)], FifoPolicy(1))
        loop.step()
    assert executor.is_closed
    assert not executor.request_by_slot


def test_an_idle_policy_with_waiting_requests_is_reported() -> None:
    class Stubborn(FifoPolicy):
        def next(self, view: object) -> Proposal | None:  # noqa: ARG002
            return None

    with pytest.raises(RuntimeError, match="proposes nothing to an idle engine while 1 requests wait"):
        list(make_loop(fake()).run([make_request(0, range(4), 1)], Stubborn(1)))


def test_a_simulator_without_tokens_schedules_the_same() -> None:
    requests = [make_request(i, [*range(i), i], 5, SamplingParams(ignore_eos=True)) for i in range(12)]
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16)
    real, simulated = EngineLoop(fake(20), config), EngineLoop(FakeSimulator(20, BLOCK_SIZE), config)
    outputs = [run_checked(loop, requests, FifoPolicy(12)) for loop in (real, simulated)]
    assert [len(o.token_ids) for o in outputs[0].values()] == [len(o.token_ids) for o in outputs[1].values()]
    assert list(outputs[0]) == list(outputs[1])
    for name in ("num_prefill_tokens", "num_decode_tokens", "num_kv_tokens", "num_running"):
        assert real.stats.steps.columns()[name].tolist() == simulated.stats.steps.columns()[name].tolist()


def test_stats_add_up() -> None:
    requests = [make_request(i, range(9), 4, SamplingParams(ignore_eos=True)) for i in range(6)]
    loop = EngineLoop(
        FakeExecutor(30, BLOCK_SIZE, VOCAB_SIZE, EOS, step_s=1.0, token_s=0.5),
        EngineConfig(max_num_seqs=2, max_num_batched_tokens=16),
        clock=iter(range(10_000)).__next__,
    )
    outputs = list(loop.run(requests, FifoPolicy(6)))
    stats, columns = loop.stats, loop.stats.steps.columns()
    num_tokens = columns["num_prefill_tokens"] + columns["num_decode_tokens"]
    assert len(stats.steps) == stats.num_steps == len(columns["end_s"])
    assert columns["elapsed_s"].tolist() == (1.0 + 0.5 * num_tokens).tolist()
    assert columns["end_s"][-1] == stats.executor_s == columns["elapsed_s"].sum()
    assert stats.num_prefill_tokens == 9 + 5 * 1  # the shared blocks once, one token of each other prompt
    assert stats.num_cached_tokens == sum(output.num_cached_tokens for output in outputs) == 5 * 8
    assert stats.prefix_hit_rate == 40 / 54
    assert stats.num_decode_tokens == 6 * 3
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (54, 24)
    assert stats.scheduling_s == 2 * stats.num_steps  # three ticks a step, one of them in the executor
    assert stats.scheduling_share == stats.scheduling_s / (stats.scheduling_s + stats.executor_s)
    assert list(stats.scheduling_s_by_step) == [2.0] * stats.num_steps
    assert stats.mean_scheduling_s == stats.p99_scheduling_s == 2.0


def test_the_slowest_hundredth_of_the_steps_is_left_out_of_p99() -> None:
    stats = RunStats(0)
    assert stats.p99_scheduling_s == stats.mean_scheduling_s == 0.0
    for milliseconds in range(200):
        stats.num_steps += 1
        stats.add_scheduling(milliseconds, has_step=True)
    stats.add_scheduling(5000, has_step=False)
    assert stats.p99_scheduling_s == 198
    assert stats.scheduling_s == sum(range(200)) + 5000
