"""The waiting queue inside vLLM's scheduler: first come first served until bound, then as the policy says."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from blendserve.engines.vllm.fake import FakeScheduler, FakeVllm
from blendserve.engines.vllm.queue import PolicyQueue, SchedulerState, index_of


class ListedPolicy:
    """Proposes a fixed order, and notes what it is told."""

    name = "listed"

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.told: list[tuple[Any, ...]] = []
        self.num_steps = 0

    @property
    def num_waiting(self) -> int:
        return len(self.order)

    def next(self, view: Any) -> int | None:
        self.view = view
        return self.order[0] if self.order else None

    def prefill_tokens(self, view: Any) -> int:
        self.num_steps += 1
        return int(view.max_num_batched_tokens)

    def admitted(self, index: int, num_cached_tokens: int) -> None:
        self.order.remove(index)
        self.told.append(("admitted", index, num_cached_tokens))

    def finished(self, index: int, num_output_tokens: int) -> None:
        self.told.append(("finished", index, num_output_tokens))

    def preempted(self, index: int, num_output_tokens: int) -> None:
        self.order.insert(0, index)
        self.told.append(("preempted", index, num_output_tokens))

    def next_use(self, key: Any) -> float:  # noqa: ARG002
        return 0.0


def request(index: int, status: str = "WAITING", num_output_tokens: int = 0) -> Any:
    return Waiting(
        request_id=f"{index}-0a1b2c3d",
        status=SimpleNamespace(name=status),
        num_prompt_tokens=10,
        num_computed_tokens=0,
        num_output_tokens=num_output_tokens,
        prompt=[1] * 10,
    )


@dataclass(eq=False)
class Waiting:
    """The fields of a request of vLLM that the queue reads."""

    request_id: str
    status: Any
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    prompt: list[int]


def bound(order: list[int], refused: frozenset[int] = frozenset()) -> tuple[PolicyQueue, ListedPolicy, FakeScheduler]:
    scheduler = FakeScheduler(FakeVllm(max_num_seqs=4), has_policy_queue=True)
    queue, policy = scheduler.waiting, ListedPolicy(order)

    def supply(index: int) -> bool:
        if index not in refused:
            queue.add_request(request(index))
        return index not in refused

    queue.bind(policy, SchedulerState(scheduler, 1024, 32), supply)
    return queue, policy, scheduler


def test_unbound_it_is_first_come_first_served() -> None:
    queue = PolicyQueue()
    first, second, third = request(5), request(3), request(4)
    assert not queue
    for one in (first, second, third):
        queue.add_request(one)
    assert (len(queue), bool(queue), list(queue)) == (3, True, [first, second, third])
    assert queue.pop_request() is first
    queue.prepend_request(first)
    assert queue.peek_request() is first
    queue.remove_requests([first, third])
    queue.prepend_requests([third, first])
    assert [queue.pop_request() for _ in range(3)] == [first, third, second]


def test_bound_it_hands_out_what_the_policy_proposes() -> None:
    queue, policy, _ = bound([2, 0, 1])
    assert len(queue) == 3
    popped = []
    while queue:
        one = queue.peek_request()
        assert queue.pop_request() is one
        popped.append(index_of(one))
    assert popped == [2, 0, 1]
    assert policy.told == [("admitted", 2, 0), ("admitted", 0, 0), ("admitted", 1, 0)]
    assert queue.admitted == {0, 1, 2}


def test_what_is_proposed_stays_until_it_is_taken() -> None:
    queue, policy, _ = bound([2, 0])
    assert index_of(queue.peek_request()) == 2
    assert queue
    assert index_of(queue.peek_request()) == 2
    assert policy.told == []


def test_what_vllm_refuses_is_passed_over() -> None:
    queue, policy, _ = bound([2, 0, 1], refused=frozenset({2, 0}))
    assert index_of(queue.pop_request()) == 1
    assert policy.told[:4] == [("admitted", 2, 0), ("finished", 2, 0), ("admitted", 0, 0), ("finished", 0, 0)]


def test_what_is_skipped_comes_first_next_time_and_blocks_nobody() -> None:
    queue, policy, _ = bound([2, 0, 1])
    skipped = queue.pop_request()
    other = queue.pop_request()
    queue.prepend_requests([skipped])
    assert len(queue) == 2
    assert queue.peek_request() is skipped
    assert queue.pop_request() is skipped
    assert index_of(queue.pop_request()) == 1
    assert [entry[1] for entry in policy.told] == [2, index_of(other), 1]  # each told once


def test_what_is_preempted_waits_again() -> None:
    queue, policy, _ = bound([2, 0])
    taken = queue.pop_request()
    taken.status.name, taken.num_output_tokens = "PREEMPTED", 7
    queue.prepend_request(taken)
    assert policy.told[-1] == ("preempted", 2, 7)
    assert queue.admitted == set()
    assert queue.pop_request() is taken


def test_no_more_are_taken_than_may_run() -> None:
    queue, _, _ = bound(list(range(9)))
    taken = [queue.pop_request() for _ in range(4)]
    assert not queue
    assert len(queue) == 5
    queue.finish(index_of(taken[0]), 3)
    assert queue


def test_the_policy_is_told_of_steps() -> None:
    queue, policy, scheduler = bound([2])
    assert queue
    assert policy.num_steps == 0
    scheduler.current_step += 3
    assert queue
    assert policy.num_steps == 3
    scheduler.current_step += 1000
    assert queue
    assert policy.num_steps == 19


def test_removed_requests_are_gone() -> None:
    queue, _, _ = bound([2, 0])
    one = queue.pop_request()
    queue.prepend_requests([one])
    queue.remove_requests([one])
    assert index_of(queue.peek_request()) == 0
    with pytest.raises(IndexError):
        PolicyQueue().peek_request()


def test_the_state_is_that_of_the_scheduler() -> None:
    scheduler = FakeScheduler(FakeVllm(num_blocks=65, max_num_seqs=4), has_policy_queue=True)
    state = SchedulerState(scheduler, 64 * 32, 32)
    assert state.free_tokens == 64 * 32
    running = request(3)
    running.num_computed_tokens, running.num_output_tokens = 11, 2
    scheduler.running.append(running)
    scheduler.num_free -= 1
    assert state.free_tokens == 63 * 32
    assert [column.tolist() for column in (state.request_index, state.num_prompt_tokens)] == [[3], [10]]
    assert [column.tolist() for column in (state.num_computed_tokens, state.num_output_tokens)] == [[11], [2]]
    running.num_computed_tokens += 1
    scheduler.current_step += 1
    assert state.num_computed_tokens.tolist() == [12]
