"""Parts for replicas, and windows that arrive while others run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import Prompt, unique_tokens
from planner_cases import COST, TinyEngine, outputs_strategy, plan_of, prompts_strategy

from blendserve.costs.step_cost import NANOFLOW
from blendserve.errors import ConfigError
from blendserve.planner.base import Policy, RequestTable
from blendserve.planner.deal import Pieces, deal_evenly_in_time
from blendserve.planner.part_time import NUM_STRETCHES, PartEngine
from blendserve.planner.partition import part_table, partition
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.sorting import flatten
from blendserve.planner.static import StaticPolicy, fcfs_order
from blendserve.planner.windows import Window, WindowedPolicy

jobs = prompts_strategy.flatmap(
    lambda prompts: st.tuples(st.just(prompts), st.tuples(*[outputs_strategy] * len(prompts)))
)


@given(jobs, st.integers(1, 5))
def test_parts_hold_every_request_once(job: tuple[list[Prompt], tuple[int, ...]], num_parts: int) -> None:
    prompts, outputs = job
    plan = plan_of(prompts, outputs)
    found = partition(plan, num_parts)
    assert len(found.parts) == num_parts
    assert sorted(np.concatenate(found.parts).tolist()) == list(range(len(prompts)))
    separate = sum(unique_tokens([prompts[index] for index in part]) for part in found.parts)
    assert found.num_lost_tokens == separate - unique_tokens(prompts)
    assert float(found.memory_s.sum()) == pytest.approx(float(plan.schedule.memory_s.sum()))


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_parts_are_even_in_both_resources_and_cut_little(num_parts: int) -> None:
    rng = np.random.default_rng(5)
    stems = [tuple(rng.integers(0, 1000, 40).tolist()) for _ in range(20)]
    prompts = [(*stems[index % 20], index) for index in range(1200)] + [(5000 + index,) for index in range(300)]
    outputs = (1,) * 1200 + tuple(rng.integers(10, 200, 300).tolist())
    plan = plan_of(prompts, outputs)
    found = partition(plan, num_parts)
    assert found.imbalance < 0.05
    assert found.density_spread < 0.1
    assert found.sharing_lost < 0.02 * num_parts
    table = part_table(plan.table, found.parts[0])
    restricted = plan.tree.restrict(found.parts[0])
    assert restricted.num_requests == len(table)
    assert (restricted.leaf_len[restricted.leaf_of] == table.num_prompt_tokens).all()


ENGINE = PartEngine(constant_s=0.5, floor_s=1.0, kv_token_s=0.001, full_s=2.0, interference=NANOFLOW)
lengths = st.lists(st.integers(1, 400).map(float), min_size=1, max_size=12)


@given(lengths, lengths)
def test_long_requests_that_start_together_read_what_they_read_alone(one: list[float], other: list[float]) -> None:
    together = ENGINE.reads_s(np.array([*one, *other]))
    assert (together >= 0).all()
    step_by_step = sum(ENGINE.kv_token_s * sum(range(int(tokens))) for tokens in [*one, *other])
    longest = max(*one, *other)
    # Each request ends within a stretch, and a step reads what was there before its own token.
    most_off = ENGINE.kv_token_s * (longest**2 / NUM_STRETCHES + longest) * (len(one) + len(other))
    assert together.sum() == pytest.approx(step_by_step, abs=most_off)


@given(st.floats(0, 500), st.floats(0, 500), lengths)
def test_a_part_takes_no_less_than_its_work_and_its_longest_request(
    compute_s: float, memory_s: float, tokens: list[float]
) -> None:
    reads_s, longest = ENGINE.reads_s(np.array(tokens)), max(tokens)
    memory_s += float(reads_s.sum())
    compute, memory, tokens_of = (np.array([value]) for value in (compute_s, memory_s, longest))
    time_s = float(ENGINE.time_s(compute, memory, tokens_of, reads_s[None, :])[0])
    num_steps = max(memory_s / ENGINE.full_s, longest)
    least_s = max(compute_s + ENGINE.constant_s * num_steps, ENGINE.floor_s * longest)
    assert time_s >= NANOFLOW.step_s(least_s, memory_s) * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(jobs, st.integers(1, 5))
def test_parts_even_in_time_hold_every_request_once(job: tuple[list[Prompt], tuple[int, ...]], num_parts: int) -> None:
    prompts, outputs = job
    found = partition(plan_of(prompts, outputs), num_parts, ENGINE)
    assert sorted(np.concatenate(found.parts).tolist()) == list(range(len(prompts)))


def test_the_part_with_the_longest_request_gets_less_of_the_rest() -> None:
    """Four long requests and much short work: a quarter of it each would let the longest one's part end last."""
    engine = PartEngine(constant_s=0.005, floor_s=0.005, kv_token_s=1e-6, full_s=0.01, interference=NANOFLOW)
    tokens = np.concatenate([[4000.0, 2500.0, 2000.0, 1800.0], np.ones(2000)])
    pieces = Pieces(np.full(2004, 0.03), engine.kv_token_s * tokens**2 / 2, tokens)
    is_small = tokens == 1

    def last_end_s(part: NDArray[np.int64]) -> float:
        compute_s, memory_s = (
            np.array([column[part == index].sum() for index in range(4)])
            for column in (pieces.compute_s, pieces.memory_s)
        )
        longest = np.array([tokens[part == index].max() for index in range(4)])
        reads_s = np.stack([engine.reads_s(tokens[(part == index) & ~is_small]) for index in range(4)])
        return float(engine.time_s(compute_s, memory_s, longest, reads_s).max())

    in_turn = np.arange(2004) % 4
    assert last_end_s(deal_evenly_in_time(pieces, 4, engine, is_small)) < 0.85 * last_end_s(in_turn)


def test_no_parts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        partition(plan_of([(1,)], (1,)), 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(jobs, min_size=1, max_size=4), st.sampled_from(POLICY_NAMES), st.booleans())
def test_windows_are_served_while_others_arrive(
    arriving: list[tuple[list[Prompt], tuple[int, ...]]], name: str, is_known: bool
) -> None:
    prompts = [prompt for window, _ in arriving for prompt in window]
    outputs = [length for _, lengths in arriving for length in lengths]

    def windows() -> list[Window]:
        found = []
        for window, lengths in arriving:
            known = np.array(lengths if is_known else [-1] * len(window), dtype=np.int64)
            sizes = np.array([len(prompt) for prompt in window], dtype=np.int64)
            table = RequestTable(sizes, np.full(len(window), 12, dtype=np.int64), known)
            found.append(Window(flatten(np.array(prompt, dtype=np.int32) for prompt in window), table))
        return found

    policy = WindowedPolicy(iter(windows()), COST, lambda plan: make_policy(name, plan))
    engine = TinyEngine(policy, [len(prompt) for prompt in prompts], outputs, 40)
    engine.run(max_steps=5000)
    assert set(engine.admissions) == set(range(len(prompts)))
    assert len(engine.admissions) == len(prompts) + engine.num_preemptions


def test_the_next_window_joins_before_the_last_request_is_admitted() -> None:
    def window(first: int) -> Window:
        prompts = flatten(np.array([first + index], dtype=np.int32) for index in range(40))
        return Window(prompts, RequestTable(np.ones(40, np.int64), np.full(40, 9), np.full(40, 9)))

    read = []

    def arriving() -> object:
        for first in (0, 100, 200):
            read.append(first)
            yield window(first)

    policy = WindowedPolicy(arriving(), COST, lambda plan: make_policy("fcfs", plan))  # type: ignore[arg-type]
    assert read == [0, 100], "one window ahead, no more"
    engine = TinyEngine(policy, [1] * 120, [9] * 120, 60)
    engine.run()
    assert set(engine.admissions) == set(range(120))


class Recorder(StaticPolicy):
    """Keeps what it is told."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("recorder", fcfs_order(plan.num_requests))
        self.plan = plan
        self.finished_as: dict[int, int] = {}

    def finished(self, index: int, num_output_tokens: int) -> None:
        self.finished_as[index] = num_output_tokens


def test_what_has_finished_tells_the_next_plan_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As requests of that plan which have left before anybody enters; the latest ones only, and no known lengths."""
    monkeypatch.setattr("blendserve.planner.windows.NUM_WITNESSES", 5)
    outputs = [2 + index % 7 for index in range(90)]

    def windows() -> Iterator[Window]:
        for first in (0, 30, 60):
            sizes = np.arange(first + 1, first + 31)  # the length of a prompt tells which one it is
            prompts = flatten(np.full(size, 7, dtype=np.int32) for size in sizes)
            known = np.where(sizes % 3 == 0, outputs[first : first + 30], -1)
            yield Window(prompts, RequestTable(sizes, np.full(30, 9), known))

    made: list[Recorder] = []

    def make(plan: Plan) -> Policy:
        made.append(Recorder(plan))
        return made[-1]

    engine = TinyEngine(WindowedPolicy(windows(), COST, make), list(range(1, 91)), outputs, 400, max_num_seqs=4)
    engine.run()
    assert set(engine.admissions) == set(range(90))
    assert len(made) == 3
    assert made[0].plan.num_requests == 30
    for recorder in made[1:]:
        table = recorder.plan.table
        witnesses = range(len(table) - 5, len(table))
        assert (table.known_output_tokens[witnesses.start :] == -1).all()
        for local in witnesses:
            assert recorder.finished_as[local] == outputs[int(table.num_prompt_tokens[local]) - 1]
        assert engine.policy.num_waiting == 0
