"""Algorithm 3: samples first, memory kept within each end's part, runaways on the memory end's account."""

from __future__ import annotations

import numpy as np
from oracles import Prompt
from planner_cases import COST, TinyEngine, plan_of

from blendserve.planner.lengths import MeanLengthModel
from blendserve.planner.paper import SAMPLE_SHARE, PaperPolicy
from blendserve.planner.plan import Plan, make_plan

NUM_LONG = 150
NUM_SHORT = 400
SIZES = [2] * NUM_LONG + [30] * NUM_SHORT
OUTPUTS = tuple(30 + index % 30 for index in range(NUM_LONG)) + (2,) * NUM_SHORT


def two_kinds(*, is_known: bool) -> Plan:
    """Short prompts with long answers, and long prompts with short answers that share their first token."""
    prompts: list[Prompt] = [(9, index) for index in range(NUM_LONG)]
    prompts += [(1, *[2] * 27, index // 20, index) for index in range(NUM_SHORT)]
    plan = plan_of(prompts, OUTPUTS, is_known=is_known)
    return plan if is_known else make_plan(plan.tree, plan.table, COST, sample_rate=0.05, lengths=None)


class WatchedPolicy(PaperPolicy):
    """Keeps what a step began with."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.order: list[int] = []
        self.num_finished_samples = 0
        self.num_early = 0

    def admitted(self, index: int, num_cached_tokens: int) -> None:
        super().admitted(index, num_cached_tokens)
        self.order.append(index)
        is_sample = index in set(self._plan.samples.tolist())
        self.num_early += not is_sample and self.num_finished_samples < SAMPLE_SHARE * len(self._plan.samples)

    def finished(self, index: int, num_output_tokens: int) -> None:
        super().finished(index, num_output_tokens)
        self.num_finished_samples += index in set(self._plan.samples.tolist())


def test_nothing_but_samples_enters_before_half_of_them_have_finished() -> None:
    policy = WatchedPolicy(two_kinds(is_known=False))
    samples = set(policy._plan.samples.tolist())
    assert len(samples) >= 10
    TinyEngine(policy, SIZES, OUTPUTS, 2000).run()
    assert set(policy.order[: len(samples)]) == samples
    assert policy.num_early == 0
    assert set(policy.order) == set(range(len(SIZES)))


class ByAverage(PaperPolicy):
    """Admits the memory end by average sizes alone."""

    def _fits_memory_end(self, request: int) -> bool:
        running = self._is_at_memory_end & ~self._scanner._is_waiting & ~self.is_finished
        average = self._plan.table.num_prompt_tokens + self._schedule.expected_output_tokens / 2
        return float(average[running].sum() + average[request]) <= self._memory_tokens[True]

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.is_finished = np.zeros(plan.num_requests, dtype=np.bool_)

    def finished(self, index: int, num_output_tokens: int) -> None:
        super().finished(index, num_output_tokens)
        self.is_finished[index] = True


def test_known_long_answers_do_not_start_all_together() -> None:
    """Their average sizes would fit; at their peak they would be preempted."""
    num_preemptions = []
    for kind in (PaperPolicy, ByAverage):
        engine = TinyEngine(kind(two_kinds(is_known=True)), SIZES, OUTPUTS, 900)
        engine.run()
        num_preemptions.append(engine.num_preemptions)
        started = engine.admissions[:60]
        assert any(index < NUM_LONG for index in started), "both ends are in flight"
        assert any(index >= NUM_LONG for index in started), "both ends are in flight"
    assert 5 * num_preemptions[0] < num_preemptions[1]


def test_a_runaway_moves_to_the_memory_end() -> None:
    prompts = [(1, *[2] * 20, index) for index in range(200)]
    outputs = (2,) * 199 + (60,)
    plan = plan_of(prompts, (2,) * 200)  # what it is told
    policy = PaperPolicy(plan)
    engine = TinyEngine(policy, [22] * 200, outputs, 600)
    engine.run()
    assert policy._is_at_memory_end[199]


def test_means_of_samples_drive_the_split() -> None:
    plan = two_kinds(is_known=False)
    means = make_plan(plan.tree, plan.table, COST, lengths=lambda tree, table: MeanLengthModel(tree, table))
    policy = PaperPolicy(means)
    TinyEngine(policy, SIZES, OUTPUTS, 2000).run()
    expected = policy._schedule.expected_output_tokens
    assert expected[:NUM_LONG].min() > 5 * expected[NUM_LONG:].max() > 0
    assert np.isfinite(policy._memory_tokens).all()


def test_golden_schedule() -> None:
    """Budgets and who runs, step by step, of three requests at each end: a change says so here."""
    prompts: list[Prompt] = [(index, *[0] * 7) for index in range(3)] + [(9, index) for index in range(3)]
    outputs = (1, 1, 1, 6, 5, 4)
    engine = TinyEngine(PaperPolicy(plan_of(prompts, outputs)), [8, 8, 8, 2, 2, 2], outputs, 32)
    engine.run()
    assert engine.schedule == [
        (16, [0, 3, 4]),
        (14, [3, 4, 1]),
        (14, [3, 4, 2]),
        (14, [3, 4, 5]),
        (13, [3, 4, 5]),
        (30, [3, 5]),
        (31, [5]),
    ]
