"""Every policy on a small engine: exactly once, no starvation, KV never exceeded, golden schedules, near the best."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Prompt
from planner_cases import COST, TinyEngine, outputs_strategy, plan_of, prompts_strategy, ranges

from blendserve.errors import ConfigError
from blendserve.planner import blend
from blendserve.planner.base import RequestTable
from blendserve.planner.blend import BlendPolicy
from blendserve.planner.lengths import MeanLengthModel
from blendserve.planner.plan import make_plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.scanner import NO_REQUEST
from blendserve.planner.static import StaticPolicy
from blendserve.planner.tree import PrefixTree
from blendserve.simulator.workloads.knowledge import GivenLengths

jobs = prompts_strategy.flatmap(
    lambda prompts: st.tuples(st.just(prompts), st.tuples(*[outputs_strategy] * len(prompts)))
)


def engine_for(
    name: str,
    prompts: list[Prompt],
    outputs: tuple[int, ...],
    capacity: int,
    *,
    is_known: bool = True,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 256,
) -> TinyEngine:
    policy = make_policy(name, plan_of(prompts, outputs, is_known=is_known))
    sizes = [len(prompt) for prompt in prompts]
    return TinyEngine(policy, sizes, outputs, capacity, max_num_seqs, max_num_batched_tokens)


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=40, deadline=None)
@given(jobs, st.booleans(), st.integers(22, 80), st.integers(1, 6))
def test_every_request_is_served_exactly_once(
    name: str, job: tuple[list[Prompt], tuple[int, ...]], is_known: bool, capacity: int, max_num_seqs: int
) -> None:
    """Under any capacity that holds the largest request, with lengths known or not."""
    prompts, outputs = job
    engine = engine_for(
        name, prompts, outputs, capacity, is_known=is_known, max_num_seqs=max_num_seqs, max_num_batched_tokens=16
    )
    engine.run(max_steps=2000)
    assert set(engine.admissions) == set(range(len(prompts)))
    assert len(engine.admissions) == len(prompts) + engine.num_preemptions
    assert engine.policy.num_waiting == 0


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize(
    ("prompts", "outputs"),
    [
        ([], ()),
        ([(1, 2, 3)] * 30, (2,) * 30),
        ([(index,) for index in range(30)], (3,) * 30),
        ([(1,)] * 10 + [tuple(range(90))], (1,) * 10 + (90,)),
        ([(7,) * length for length in range(1, 30)], (2,) * 29),
        ([(index,) for index in range(10)], (0,) * 10),
        ([(index % 2,) for index in range(20)], (4,) * 20),
    ],
    ids=["empty", "all identical", "all distinct", "one giant", "nested chain", "no outputs", "ties"],
)
def test_adversarial_jobs_end(name: str, prompts: list[Prompt], outputs: tuple[int, ...]) -> None:
    engine = engine_for(name, prompts, outputs, 200)
    engine.run(max_steps=2000)
    assert set(engine.admissions) == set(range(len(prompts)))


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("kind", ["nested chain", "all identical", "all distinct"])
def test_ten_thousand_requests_of_one_shape_are_each_admitted_once(name: str, kind: str) -> None:
    """No recursion, no starvation, and eviction ranks that can be asked for at any depth."""
    count = 10_000
    lengths = np.arange(1, count + 1) if kind == "nested chain" else np.full(count, 20)
    shared = {"nested chain": lengths - 1, "all identical": lengths, "all distinct": 0 * lengths}[kind]
    tree = PrefixTree.from_sorted(np.arange(count), np.append(0, shared[1:]), lengths)
    outputs = np.arange(count) % 5  # zero-length ones among them
    plan = make_plan(tree, RequestTable(lengths, outputs, outputs), COST)
    policy = make_policy(name, plan)
    keys = plan.tree.block_keys(count - 1, 16)
    idle = TinyEngine(policy, lengths.tolist(), outputs.tolist(), 1_000_000)
    admitted = np.zeros(count, dtype=np.int64)
    while policy.num_waiting:
        proposal = policy.next(idle.view())
        assert proposal is not None, "an idle engine is offered nothing"
        request = proposal.index
        policy.admitted(proposal, 0)
        admitted[request] += 1
        policy.begin_step(idle.view(), 1)
        policy.finished(request, int(outputs[request]))
    assert (admitted == 1).all()
    assert all(policy.next_use(key) >= 0 for key in keys)


def mixed_job(num_short: int = 60, num_long: int = 12) -> tuple[list[Prompt], tuple[int, ...]]:
    """Long prompts that share a stem and answer in a token, and short prompts with long answers."""
    stem = (1,) * 16
    short = [(*stem, *(2,) * (index % 5), 3, index) for index in range(num_short)]
    long = [(9, index) for index in range(num_long)]
    return short + long, (1,) * num_short + tuple(60 + 5 * index for index in range(num_long))


def test_golden_orders() -> None:
    prompts, outputs = mixed_job(6, 3)
    plan = plan_of(prompts, outputs)
    assert plan.schedule.order.tolist() == [0, 5, 1, 2, 3, 4, 6, 7, 8]
    served = {}
    for name in POLICY_NAMES:
        engine = engine_for(name, prompts, outputs, 300, max_num_batched_tokens=32)
        engine.run()
        served[name] = engine.admissions
    assert served["fcfs"] == list(range(9))
    assert served["dfs"] == plan.tree.order.tolist()
    assert served["longest-first"] == [8, 7, 6, 0, 1, 2, 3, 4, 5]
    assert served["lexical-buckets"] == [4, 3, 2, 1, 0, 5, 6, 7, 8]
    assert served["blend"][:3] == [8, 7, 6], "the memory end enters longest first"
    assert served["blend"][3:] == [0, 5, 1, 2, 3, 4], "the compute end follows in the order of the plan"


def test_a_prefix_shorter_than_a_block_keeps_nobody_together() -> None:
    """No engine shares it: such requests are sorted by density, where a stem of a block holds its group together."""
    stem = tuple(range(4))
    prompts = [(*stem, 7, index) for index in range(6)] + [(*stem, 8, 8, 8, index) for index in range(6)]
    outputs = (1, 40, 2, 30, 3, 20) * 2
    sorted_outputs = [outputs[index] for index in plan_of(prompts, outputs, block_size=8).schedule.order]
    assert sorted_outputs == sorted(outputs)
    assert [outputs[index] for index in plan_of(prompts, outputs, block_size=2).schedule.order] != sorted(outputs)


def test_blend_looks_past_a_dense_request_at_its_memory_end() -> None:
    """The least dense subtree may hold a short answer as well; those behind it must not wait for it."""
    stem = (5,) * 20
    prompts = [(*stem, 0), (*stem, 1)] + [(9, index) for index in range(6)] + [(8, *range(40), i) for i in range(8)]
    outputs = (400, 1) + (60,) * 6 + (1,) * 8
    plan = plan_of(prompts, outputs)
    assert plan.schedule.order[-2:].tolist() == [1, 0]
    engine = engine_for("blend", prompts, outputs, 2000)
    engine.run()
    assert set(engine.admissions[:7]) == {0, *range(2, 8)}, "there is memory for all long answers at once"


def test_samples_go_before_decodes_that_would_fill_every_slot() -> None:
    prompts: list[Prompt] = [(index,) for index in range(400)]
    engine = engine_for("blend", prompts, (20,) * 400, 100_000, is_known=False, max_num_seqs=32)
    samples = set(plan_of(prompts, (20,) * 400, is_known=False).samples.tolist())
    engine.run()
    assert samples
    assert set(engine.admissions[: len(samples)]) == samples


def test_what_shares_a_prefix_is_not_taken_out_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the memory end does not fit, nor may anything behind it leave its group, however far one looks."""
    monkeypatch.setattr(blend, "MAX_LOOKAHEAD", 8)
    stem = (5,) * 40
    prompts = [(*stem, index) for index in range(200)]
    outputs = (50,) * 199 + (500,)
    policy = BlendPolicy(plan_of(prompts, outputs))
    policy.begin_step(TinyEngine(policy, [41] * 200, outputs, 300).view(), 1)
    assert policy._next_at_memory_end() == NO_REQUEST


def test_blend_never_preempts_when_lengths_are_known() -> None:
    prompts, outputs = mixed_job()
    for capacity in (150, 250, 400):
        engine = engine_for("blend", prompts, outputs, capacity)
        engine.run()
        assert engine.num_preemptions == 0


def test_blend_spreads_compute_over_the_memory_bound_steps() -> None:
    prompts, outputs = mixed_job()
    elapsed = {}
    for name in ("blend", "dfs", "fcfs", "random"):
        engine = engine_for(name, prompts, outputs, 800)
        engine.run()
        elapsed[name] = engine.elapsed_s
    assert elapsed["blend"] == min(elapsed.values())


@pytest.mark.parametrize("seed", range(6))
def test_blend_beats_the_best_of_all_orders(seed: int) -> None:
    """Exhaustive search: no fixed order of six requests, admitted as memory allows, beats feedback on the step mix."""
    rng = np.random.default_rng(seed)
    prompts = [(index, *[0] * int(rng.choice([2, 40]))) for index in range(6)]
    outputs = tuple(int(rng.choice([1, 3, 20, 40])) for _ in range(6))
    sizes = [len(prompt) for prompt in prompts]

    def elapsed(order: tuple[int, ...]) -> float:
        engine = TinyEngine(StaticPolicy("given", ranges(order)), sizes, outputs, 240)
        engine.run()
        return engine.elapsed_s

    best = min(elapsed(order) for order in permutations(range(6)))
    engine = engine_for("blend", prompts, outputs, 240)
    engine.run()
    assert engine.elapsed_s <= best


@pytest.mark.parametrize("name", ["blend", "paper"])
def test_samples_are_served_first(name: str) -> None:
    prompts = [(index // 50, index) for index in range(400)]
    plan = make_plan(plan_of(prompts, (5,) * 400).tree, plan_of(prompts, (5,) * 400, is_known=False).table, COST)
    engine = TinyEngine(make_policy(name, plan), [2] * 400, [5] * 400, 400)
    engine.run()
    assert len(plan.samples) >= 4
    position = {request: place for place, request in enumerate(engine.admissions)}
    late = sum(position[int(sample)] > 40 for sample in plan.samples)
    assert late == 0


def test_blend_plans_anew_when_lengths_turn_out_otherwise() -> None:
    prompts = [(index % 2, index) for index in range(600)]
    outputs = tuple(2 if index % 2 else 40 for index in range(600))
    plan = plan_of(prompts, outputs, is_known=False)
    policy = BlendPolicy(plan)
    engine = TinyEngine(policy, [2] * 600, outputs, 600)
    engine.run()
    assert policy.num_replans >= 1
    assert sorted(set(engine.admissions)) == list(range(600))


def test_the_paper_policy_holds_the_split_of_figure_6() -> None:
    """M_L and M_R follow the densities of the ends; both ends are in flight at once."""
    prompts, outputs = mixed_job(200, 20)
    engine = engine_for("paper", prompts, outputs, 400)
    engine.run()
    first = engine.admissions[:12]
    assert any(request < 200 for request in first)
    assert any(request >= 200 for request in first)


def test_mean_lengths_drive_the_paper_policy() -> None:
    prompts = [(index % 2, index) for index in range(300)]
    outputs = tuple(2 if index % 2 else 30 for index in range(300))
    tree, table = plan_of(prompts, outputs).tree, plan_of(prompts, outputs, is_known=False).table
    plan = make_plan(tree, table, COST, lengths=MeanLengthModel)
    engine = TinyEngine(make_policy("paper", plan), [2] * 300, outputs, 300)
    engine.run()
    assert set(engine.admissions) == set(range(300))


def test_blocks_of_finished_subtrees_are_never_used_again() -> None:
    prompts, outputs = mixed_job(6, 3)
    plan = plan_of(prompts, outputs)
    policy = make_policy("blend", plan)
    stem = plan.tree.block_keys(0, 16)[0]
    other = plan.tree.block_keys(8, 2)[0]
    assert policy.next_use(stem) < np.inf
    engine = TinyEngine(policy, [len(prompt) for prompt in prompts], outputs, 300)
    engine.run()
    assert policy.next_use(stem) == np.inf
    assert policy.next_use(other) == np.inf
    assert policy.next_use(b"a content key") == 0.0


def test_without_overlap_steps_are_filled_up() -> None:
    """The mix of a step is of no matter there, so nothing is spread: the budget is the whole step."""
    prompts, outputs = mixed_job()
    budgets = {}
    for has_overlap in (True, False):
        plan = plan_of(prompts, outputs, cost=replace(COST, has_overlap=has_overlap))
        engine = TinyEngine(BlendPolicy(plan), [len(prompt) for prompt in prompts], outputs, 800)
        budgets[has_overlap] = engine.policy.begin_step(engine.view(), 1).num_prefill_tokens
    assert budgets[False] == 256
    assert budgets[True] < 256


def test_without_overlap_no_long_answer_is_left_for_the_end() -> None:
    """Memory that waits for the compute end would keep the longest answers out until all others are done."""
    rng = np.random.default_rng(3)
    stem = tuple(range(100, 204))
    prompts = [(*stem, 1000 + index) for index in range(40)] + [(2000 + index,) * 10 for index in range(50)]
    prompts += [(3000 + index,) * 120 for index in range(20)]
    outputs = (2,) * 40 + tuple(rng.integers(40, 101, 50).tolist()) + (3,) * 20
    plan = plan_of(prompts, outputs, cost=replace(COST, has_overlap=False))
    engine = TinyEngine(BlendPolicy(plan), [len(prompt) for prompt in prompts], outputs, 2400)
    engine.run()
    answers = [outputs[request] for request in engine.admissions if outputs[request] >= 40]
    assert engine.num_preemptions == 0
    assert sorted(answers[-5:]) == sorted(answers)[:5]


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy 'best'; known: .*blend.*fcfs"):
        make_policy("best", plan_of([(1,)], (1,)))


def test_blend_fills_half_of_the_memory_while_guesses_are_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the truth, until enough has finished: half of the memory is then what half of the memory was taken for."""
    outputs = np.array([60] * 40 + [2] * 400)
    prompts = [(index,) for index in range(len(outputs))]

    def num_preemptions(share: float) -> int:
        monkeypatch.setattr(blend, "UNPROVEN_SHARE", share)
        table = RequestTable(ranges([1] * len(outputs)), outputs, ranges([-1] * len(outputs)))
        tree = PrefixTree.from_prompts(np.array(prompt, dtype=np.int32) for prompt in prompts)
        plan = make_plan(tree, table, COST, lengths=lambda _tree, _table: GivenLengths(outputs / 2, learns=True))
        engine = TinyEngine(BlendPolicy(plan), [1] * len(outputs), outputs.tolist(), 1000)
        engine.run(max_steps=5000)
        return engine.num_preemptions

    assert num_preemptions(1.0) > 0
    assert num_preemptions(0.5) == 0
