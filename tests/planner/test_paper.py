"""Algorithm 3: samples first, memory kept within each end's part, runaways on the memory end's account."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import Prompt
from planner_cases import COST, TinyEngine, plan_of

from blendserve.planner.base import Proposal
from blendserve.planner.ends import EndShape, end_shape, split_memory
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

    def admitted(self, proposal: Proposal, num_cached_tokens: int) -> None:
        super().admitted(proposal, num_cached_tokens)
        index = proposal.index
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
        return float(average[running].sum() + average[request]) <= self._split.memory_end.memory_tokens

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
    assert np.isfinite([end.memory_tokens for end in policy._split]).all()


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


def test_shares_of_memory_have_the_density_of_the_rest() -> None:
    """Figure 6: 60 GB between ends of density 2.2 and 0.3, for a rest of 1.2; prefill is N p / d."""
    dense, sparse = EndShape(2.2, 100.0, 80.0, 10.0), EndShape(0.3, 20.0, 20.0, 400.0)
    split = split_memory(dense, sparse, 1.2, 60_000)
    low, high = split.compute_end.memory_tokens, split.memory_end.memory_tokens
    assert low + high == pytest.approx(60_000)
    assert (2.2 * low + 0.3 * high) / 60_000 == pytest.approx(1.2)
    assert split.compute_end.prefill_tokens == pytest.approx(low / (100 + 10 / 2) * 80 / 10)
    assert split.num_prefill_tokens == pytest.approx(low / 105 * 8 + high / 220 / 20)


def test_an_end_is_as_the_requests_that_fill_the_memory() -> None:
    """Requests 0 to 2 hold 8 tokens and a half on average: 20 tokens of memory hold three of them, the last in part."""
    plan = plan_of([(index, *[0] * 7) for index in range(6)], (1, 1, 1, 9, 9, 9))
    requests = np.arange(6)
    shape = end_shape(plan, plan.schedule, requests, 20)
    assert (shape.prompt_tokens, shape.output_tokens) == (8, 1)
    assert end_shape(plan, plan.schedule, requests, 1000).output_tokens == 5
    assert end_shape(plan, plan.schedule, requests[:0], 20).density == plan.schedule.root_density
