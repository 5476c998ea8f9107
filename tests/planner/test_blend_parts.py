"""The parts of policy `blend`, each alone: what remains, the pace, the horizon, the memory gate, when it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import COST, plan_of, ranges

from blendserve.planner.base import EngineLimits, SchedulerView, scheduler_view
from blendserve.planner.horizon import Horizon
from blendserve.planner.learner import MIN_NEW_OBSERVATIONS, Learner, Refresher
from blendserve.planner.memory_gate import MemoryGate
from blendserve.planner.pace import (
    MAX_PREFILL_STEPS,
    RestOfJob,
    RunningLoad,
    num_steps_left,
    prefill_budget,
    step_share,
)
from blendserve.planner.plan import Plan
from blendserve.planner.remaining import TRUST_TOKENS, Remaining
from blendserve.planner.reserve import compute_end_reserve, steady_tokens
from blendserve.planner.scanner import DualScanner

SEQUENTIAL = replace(COST, has_overlap=False)


def mixed_plan(*, is_known: bool = True) -> Plan:
    """Six long prompts with a common stem and answers of two tokens, and four short prompts with long answers."""
    prompts = [(*[5] * 20, index) for index in range(6)] + [(9, index) for index in range(4)]
    return plan_of(prompts, (2,) * 6 + (60, 50, 40, 30), is_known=is_known)


def view_of(rows: list[tuple[int, int, int, int]]) -> SchedulerView:
    """Rows: request, prompt, computed and output tokens."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return scheduler_view(EngineLimits(1000, 8, 64), 500, columns)


# The view


def test_a_view_cannot_be_changed_and_leaves_the_engine_its_arrays() -> None:
    view = view_of([(3, 10, 4, 0), (1, 5, 6, 2)])
    assert (view.num_running, view.num_pending_tokens.tolist()) == (2, [5, 0])
    with pytest.raises(AttributeError):
        view.free_tokens = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        view.num_computed_tokens[0] = 0
    columns = np.ones((4, 2), dtype=np.int64)
    shown = scheduler_view(EngineLimits(1, 1, 1), 0, columns)
    columns[0] = 7, 2
    assert shown.request_index.tolist() == [7, 2], "it borrows, it does not copy"


# What remains


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40))
def test_what_remains_is_the_sum_over_those_that_wait(moves: list[int]) -> None:
    """A request that is named enters if it waits and comes back if it runs."""
    plan = mixed_plan()
    remaining, waiting = Remaining(plan), set(range(10))
    for request in moves:
        if request in waiting:
            remaining.enter(request, int(remaining.own_tokens(request)))
        else:
            remaining.put_back(request)
        waiting ^= {request}
    remaining.check(np.array(sorted(waiting), dtype=np.int64))


def test_an_admission_moves_work_from_waiting_to_running() -> None:
    remaining = Remaining(mixed_plan())
    compute_s, memory_s = remaining.compute_s, remaining.memory_s
    remaining.enter(7, int(remaining.own_tokens(7)))
    assert remaining.compute_s == pytest.approx(compute_s)
    assert remaining.memory_s == pytest.approx(memory_s)
    assert remaining.running_memory_s > 0


def test_sharing_that_is_not_found_makes_the_rest_longer() -> None:
    """Nothing of the stem was in the cache: those that wait will compute more than planned as well."""
    plan = mixed_plan()
    planned, found = Remaining(plan), Remaining(plan)
    second = int(plan.schedule.order[1])
    assert plan.schedule.num_shared_tokens[second] == 20
    planned.enter(second, 1)
    found.enter(second, 21)
    lost = 20 / (TRUST_TOKENS + 1)
    assert found.compute_s == pytest.approx(planned.compute_s + lost * found._waiting_prefill_s)


def test_what_runs_counts_by_what_is_left_of_it() -> None:
    remaining = Remaining(mixed_plan())
    remaining.measure_running(6, ranges([10, 30]), np.array([2.0, 4.0]), np.array([4.0, 16.0]))
    assert remaining.running_compute_s == pytest.approx(COST.token_s * (6 + 2 + 4))
    assert remaining.running_memory_s == pytest.approx(COST.kv_token_s * (10 * 2 + 2 + 30 * 4 + 8))


def test_the_memory_end_is_below_the_density_of_the_rest() -> None:
    """Of the long answers, the two longest are: 1.6 and 1.9, where all requests together have 2.3."""
    plan = mixed_plan()
    assert 2.2 < plan.schedule.root_density < 2.4
    assert np.flatnonzero(Remaining(plan).are_memory_intensive(np.arange(10))).tolist() == [6, 7]


# The pace

REST = RestOfJob(compute_s=1000.0, memory_s=400.0, num_idle_steps=0.0, has_waiting=True)


def budget(rest: RestOfJob, load: RunningLoad, cost: object = COST, limit: int = 10_000) -> int:
    return prefill_budget(cost, rest, load, full_kv_tokens=1000.0, max_num_batched_tokens=limit)  # type: ignore[arg-type]


def test_steps_at_full_memory_share_the_compute_evenly() -> None:
    """400 s of memory time are 20 steps of 20 s: the even share of a step is a twentieth of the compute."""
    assert num_steps_left(REST, full_s=20.0) == 20
    assert step_share(COST, REST, num_kv_tokens=1000.0, full_kv_tokens=1000.0) == pytest.approx(1 / 20)
    assert budget(REST, RunningLoad(1000.0, 10, 0)) == 40, "50 tokens, 10 of which are decodes"


def test_shares_add_up_to_the_whole() -> None:
    """A step at half the memory takes its own part and the even part; the shares of all steps make one."""
    loads = [200.0, 1000.0, 500.0, 900.0, 400.0]
    left = 1.0
    memory_s = sum(loads) * COST.kv_token_s
    for position, num_kv_tokens in enumerate(loads):
        rest = RestOfJob(1.0, memory_s, float(len(loads) - position), has_waiting=True)
        left -= left * step_share(COST, rest, num_kv_tokens, 1000.0)
        memory_s -= num_kv_tokens * COST.kv_token_s
    assert left == pytest.approx(0.0, abs=1e-9)


def test_a_step_that_reads_more_gets_more() -> None:
    budgets = [budget(REST, RunningLoad(float(kv), 0, 0)) for kv in (0, 250, 500, 1000)]
    assert budgets == sorted(budgets)
    assert budgets[0] == budgets[-1] // 3, "an idle step counts for half of a full one, which counts for one and a half"


def test_without_overlap_only_idle_steps_hold_compute_back() -> None:
    load = RunningLoad(1000.0, 0, 0)
    assert budget(REST, load, SEQUENTIAL) == 1000
    assert budget(REST._replace(num_idle_steps=10.0), load, SEQUENTIAL) == 100


def test_what_was_admitted_is_computed_soon() -> None:
    nothing_left = RestOfJob(0.0, 400.0, 0.0, has_waiting=True)
    load = RunningLoad(0.0, 0, 160)
    assert budget(nothing_left, load) == 160 // MAX_PREFILL_STEPS
    assert budget(nothing_left._replace(has_waiting=False), load) == 160
    assert budget(REST, RunningLoad(1000.0, 0, 0), limit=7) == 7


# The horizon


def test_idle_steps_are_those_beyond_the_longest_that_waits() -> None:
    plan = mixed_plan()
    scanner, learner = DualScanner(plan.schedule.order, plan.samples), Learner(plan)
    horizon = Horizon(scanner, learner)
    assert horizon.num_idle_steps(0) == -60, "the longest waits"
    scanner.take(6)
    horizon.enter(6, step=5)
    assert horizon.num_idle_steps(5) == 60 - 50
    horizon.measure_running(10, np.array([70.0, 3.0]))
    assert horizon.num_idle_steps(12) == 68 - 50


def test_the_horizon_asks_again_when_estimates_have_changed() -> None:
    plan = mixed_plan(is_known=False)
    scanner, learner = DualScanner(plan.schedule.order, plan.samples), Learner(plan)
    horizon = Horizon(scanner, learner)
    before = horizon.num_idle_steps(0)
    for request in range(10):
        learner.lengths.observe(request, 2)
    learner.refresh(view_of([]), scanner.waiting())
    horizon.forget()
    assert horizon.num_idle_steps(0) > before


# The memory gate


def gate_of(limit: float, reserve: float) -> MemoryGate:
    gate = MemoryGate(mixed_plan().new_lengths())
    gate.limit, gate.reserve = limit, reserve
    return gate


def test_the_memory_end_leaves_the_reserve_to_the_compute_end() -> None:
    """Request 6 holds 2 tokens and grows by 60: with a reserve of 40 of 100, it does not fit; without, it does."""
    assert gate_of(100.0, 0.0).has_room_at_memory_end(6, 0, 2.0)
    assert not gate_of(100.0, 40.0).has_room_at_memory_end(6, 0, 2.0)
    assert gate_of(100.0, 40.0).has_room(6, 0, 2.0), "the reserve binds the memory end alone"


def test_who_enters_takes_room_in_one_forecast_or_in_both() -> None:
    gate = gate_of(100.0, 0.0)
    gate.enter(6, 0, 2.0, at_memory_end=True)
    gate.enter(0, 0, 21.0, at_memory_end=False)
    assert gate.memory_end.peak == pytest.approx(62.0)
    assert gate.everyone.peak == pytest.approx(62.0)
    assert not gate.has_room(7, 0, 2.0)
    gate.rebuild(0, np.zeros(0), np.zeros((0, 1)), np.zeros(0, dtype=np.bool_))
    assert gate.has_room(7, 0, 2.0), "forgotten with the rest"


def test_a_rebuilt_gate_counts_each_request_at_its_end() -> None:
    gate = gate_of(100.0, 0.0)
    gate.rebuild(3, np.array([10.0, 20.0]), np.array([[5.0], [5.0]]), np.array([True, False]))
    assert (gate.memory_end.peak, gate.everyone.peak) == (15.0, 40.0)


# The reserve


def reserve_of(plan: Plan, budget: int, present_tokens: float = 0.0) -> float:
    upcoming = np.arange(6)
    return compute_end_reserve(plan, plan.schedule, upcoming, present_tokens=present_tokens, budget=budget)


def test_the_compute_end_keeps_what_its_supply_holds() -> None:
    """Six requests compute 26 prompt tokens and hold 6 x 2 x (21 + 1) token-steps: ten tokens a step hold about 100."""
    plan = mixed_plan()
    assert steady_tokens(plan, plan.schedule, np.arange(6), 10) == pytest.approx(10 * 264 / 26)
    assert reserve_of(plan, budget=10) == pytest.approx(10 * 264 / 26 + 21)
    assert reserve_of(plan, budget=10, present_tokens=500.0) == 521, "or what it holds already"
    assert steady_tokens(plan, plan.schedule, np.arange(0), 10) == 0


def test_without_overlap_the_next_prompt_needs_room_and_no_supply() -> None:
    plan = replace(mixed_plan(), cost=SEQUENTIAL)
    assert reserve_of(plan, budget=10_000, present_tokens=500.0) == 21


# Learning


def test_estimates_are_refreshed_once_enough_has_finished() -> None:
    plan = plan_of([(index,) for index in range(60)], (5,) * 60, is_known=False)
    refresher = Refresher(plan.new_lengths())
    due = []
    for request in range(60):
        refresher.lengths.observe(request, 5)
        if refresher.is_due:
            due.append(request)
            refresher.refresh(view_of([]))
    assert due == [MIN_NEW_OBSERVATIONS * (count + 1) - 1 for count in range(3)]
