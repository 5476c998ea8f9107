"""Requests that go ahead: everybody gets the answers that they get alone, and the plan is served in full."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine_scenarios import BLOCK_SIZE, EOS, VOCAB_SIZE, PlannedPolicy, make_loop, make_request

from blendserve.engine.fake import FakeExecutor, expected_tokens
from blendserve.engine.front import FIRST_INDEX, Front, NothingPlanned
from blendserve.engine.loop import EngineLoop
from blendserve.request import Request, SequenceOutput, TokenIds


class Heard:
    """What a front tells."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[list[int]]] = {}
        self.outputs: dict[int, SequenceOutput] = {}
        self.order: list[int] = []

    def on_tokens(self, index: int, token_ids: TokenIds) -> None:
        self.tokens.setdefault(index, []).append(token_ids.tolist())

    def on_output(self, index: int, output: SequenceOutput) -> None:
        assert index not in self.outputs
        self.outputs[index] = output


def some_requests(count: int, seed: int, base: int = 0) -> list[Request]:
    chance = random.Random(seed)
    shared = [chance.randrange(8, VOCAB_SIZE) for _ in range(9)]
    return [
        make_request(
            base + index,
            shared[: chance.randrange(10)] + [chance.randrange(8, VOCAB_SIZE) for _ in range(chance.randrange(1, 9))],
            chance.randrange(1, 12),
        )
        for index in range(count)
    ]


def make_fake_loop(num_blocks: int) -> EngineLoop:
    return make_loop(FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB_SIZE, eos_token_ids=EOS), max_num_seqs=5)


@pytest.mark.parametrize("seed", range(12))
def test_the_front_and_the_plan_both_get_their_own_answers(seed: int) -> None:
    planned, ahead = some_requests(30, seed), some_requests(12, seed + 100, base=1000)
    heard, loop = Heard(), make_fake_loop(num_blocks=12 + seed)
    front = Front(heard.on_tokens, heard.on_output)
    indices: list[int] = front.add(ahead[:3])
    found: dict[int, list[int]] = {}
    policy = PlannedPolicy(planned, list(range(30)), seed)
    for output in front.run(loop, planned, policy):
        found[output.index] = output.token_ids.tolist()
        loop.check()
        if len(indices) < len(ahead):
            indices += front.add([ahead[len(indices)]])
    while front.has_work:
        assert list(front.run(loop, (), NothingPlanned())) == []
    assert found == {request.index: expected_tokens(request, VOCAB_SIZE, EOS) for request in planned}
    for index, request in zip(indices, ahead, strict=True):
        wanted = expected_tokens(request, VOCAB_SIZE, EOS)
        assert heard.outputs[index].token_ids.tolist() == wanted
        told = heard.tokens.get(index, [])
        assert all(part == wanted[: len(part)] for part in told)
        assert [len(part) for part in told] == sorted(len(part) for part in told)
    assert loop.batcher.pool.num_free == 12 + seed


def test_who_comes_goes_ahead_of_what_waits() -> None:
    planned = [make_request(index, [8, 9, 10], 2) for index in range(40)]
    heard, loop = Heard(), make_fake_loop(num_blocks=40)
    front = Front(heard.on_tokens, heard.on_output)
    num_before = 0
    for output in front.run(loop, planned, PlannedPolicy(planned, list(range(40)))):
        if output.index == planned[5].index:
            front.add(some_requests(1, 1))
        num_before += not heard.outputs
    assert heard.outputs
    assert num_before < 30


def test_a_held_front_lets_a_run_end_and_goes_first_in_the_next() -> None:
    heard, loop = Heard(), make_fake_loop(num_blocks=40)
    front = Front(heard.on_tokens, heard.on_output)
    front.add(some_requests(2, 1))

    def run() -> Iterator[SequenceOutput]:
        return front.run(loop, (), NothingPlanned())

    outputs = run()
    front_run = list(outputs)
    assert front_run == []
    assert len(heard.outputs) == 2
    late = front.add(some_requests(1, 2))
    front.hold()
    assert front.num_waiting == 0
    assert list(run()) == []  # a new run lets it in again
    assert set(late) <= set(heard.outputs)


def test_what_is_withdrawn_never_runs() -> None:
    heard, loop = Heard(), make_fake_loop(num_blocks=40)
    front = Front(heard.on_tokens, heard.on_output)
    first, second = front.add(some_requests(2, 1))
    assert first >= FIRST_INDEX
    front.withdraw([first])
    assert list(front.run(loop, (), NothingPlanned())) == []
    assert set(heard.outputs) == {second}


def test_a_run_that_is_closed_starts_its_front_again() -> None:
    planned, ahead = some_requests(20, 3), some_requests(4, 4)
    heard, loop = Heard(), make_fake_loop(num_blocks=30)
    front = Front(heard.on_tokens, heard.on_output)
    indices = front.add(ahead)
    outputs = front.run(loop, planned, PlannedPolicy(planned, list(range(20))))
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert list(front.run(loop, (), NothingPlanned())) == []
    for index, request in zip(indices, ahead, strict=True):
        assert heard.outputs[index].token_ids.tolist() == expected_tokens(request, VOCAB_SIZE, EOS)
