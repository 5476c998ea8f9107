"""The paper's policy: accounts of both ends, who changes sides, and its golden schedule."""

from __future__ import annotations

import pytest
from oracles import Prompt
from planner_cases import TinyEngine, plan_of

from blendserve.planner.paper import CHECK_STEPS, RUNAWAY_RATIO, PaperPolicy

NUM_COMPUTE, NUM_MEMORY = 30, 10
PROMPTS: list[Prompt] = [(index, *[0] * 39) for index in range(NUM_COMPUTE)] + [
    (100 + index, 1) for index in range(NUM_MEMORY)
]
OUTPUTS = (2,) * NUM_COMPUTE + (60,) * NUM_MEMORY
SIZES = [len(prompt) for prompt in PROMPTS]


@pytest.fixture
def engine() -> TinyEngine:
    """An engine whose policy has admitted what its accounts hold; nothing has run."""
    engine = TinyEngine(PaperPolicy(plan_of(PROMPTS, OUTPUTS)), SIZES, OUTPUTS, 600)
    engine._admit({})
    assert engine.policy.next(engine) is None, "both accounts are full"
    assert {request < NUM_COMPUTE for request in engine.admissions} == {True, False}
    return engine


def policy_of(engine: TinyEngine) -> PaperPolicy:
    assert isinstance(engine.policy, PaperPolicy)
    return engine.policy


def check_runaways(engine: TinyEngine) -> None:
    for _ in range(CHECK_STEPS):
        engine.policy.prefill_tokens(engine)


def test_a_runaway_of_the_compute_end_moves_to_the_memory_account(engine: TinyEngine) -> None:
    policy, row = policy_of(engine), engine.rows[0]
    runaway = row[0]
    assert runaway < NUM_COMPUTE
    used = list(policy._used)
    row[2] = int(RUNAWAY_RATIO * OUTPUTS[runaway]) + 1
    check_runaways(engine)
    own = SIZES[runaway] + row[2]
    assert policy._used == pytest.approx([used[0] - SIZES[runaway] - OUTPUTS[runaway] / 2, used[1] + own])
    admitted = engine.policy.next(engine)
    assert admitted is not None
    assert admitted < NUM_COMPUTE, "the compute end has room again"
    policy.preempted(runaway, row[2])
    assert policy._scanner.peek_memory_end() == runaway, "it comes back where it belongs now"
    assert policy._used[1] == pytest.approx(used[1])


def test_who_runs_on_within_bounds_or_at_the_memory_end_stays(engine: TinyEngine) -> None:
    policy = policy_of(engine)
    used = list(policy._used)
    for row in engine.rows:
        row[2] = int(RUNAWAY_RATIO * OUTPUTS[row[0]]) if row[0] < NUM_COMPUTE else 10 * OUTPUTS[row[0]]
    check_runaways(engine)
    assert policy._used == used
    assert engine.policy.next(engine) is None


def test_who_ends_early_makes_room_at_its_end(engine: TinyEngine) -> None:
    first, last = engine.rows[0][0], engine.rows[-1][0]
    assert first < NUM_COMPUTE <= last
    for request, is_compute in ((first, True), (last, False)):
        engine.rows = [row for row in engine.rows if row[0] != request]
        engine.policy.finished(request, 1)
        following = engine.policy.next(engine)
        assert following is not None
        assert (following < NUM_COMPUTE) == is_compute
        engine.policy.admitted(following, 0)
        engine.rows.append([following, 0, 0])
        assert engine.policy.next(engine) is None


def test_golden_schedule() -> None:
    """Budgets and who runs, step by step, of three requests at each end: a change says so here."""
    prompts: list[Prompt] = [(index, *[0] * 7) for index in range(3)] + [(9, index) for index in range(3)]
    engine = TinyEngine(PaperPolicy(plan_of(prompts, (1, 1, 1, 6, 5, 4))), [8, 8, 8, 2, 2, 2], (1, 1, 1, 6, 5, 4), 32)
    engine.run()
    assert engine.schedule == [
        (8, [0, 3, 4, 5]),
        (8, [3, 4, 5, 1]),
        (8, [3, 4, 5, 1]),
        (8, [3, 4, 5, 2]),
        (8, [3, 4, 5]),
        (8, [3, 4]),
        (8, [3]),
    ]
