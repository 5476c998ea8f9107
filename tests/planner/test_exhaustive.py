"""Small jobs against all there is: every mix of the two ends, every order of the requests."""

from __future__ import annotations

from collections import deque
from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Prompt, shared_prefix, walk_tokens
from planner_cases import COST, TinyEngine, plan_of, ranges

from blendserve.planner.aggregates import leaf_costs
from blendserve.planner.base import Policy
from blendserve.planner.order import order_leaves
from blendserve.planner.policies import make_policy
from blendserve.planner.scanner import NO_REQUEST, DualScanner
from blendserve.planner.static import StaticPolicy

MAX_REQUESTS = 8
NOBODY = np.zeros(0, dtype=np.int64)
small_jobs = st.integers(0, MAX_REQUESTS).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), min_size=count, max_size=count),
        st.lists(st.integers(0, 12), min_size=count, max_size=count),
    )
)


@settings(max_examples=25, deadline=None)
@given(small_jobs)
def test_every_mix_of_the_ends_serves_all_and_recomputes_one_path(job: tuple[list[Prompt], list[int]]) -> None:
    """All 2^n ways to choose between the ends: each end walks on where it stood, and what they lose together is the
    prefix that the two requests share where they meet."""
    prompts, outputs = job
    order = plan_of(prompts, outputs).schedule.order
    in_order = [prompts[request] for request in order]
    for choices in product((False, True), repeat=len(prompts)):
        scanner, waiting = DualScanner(order, NOBODY), deque(order.tolist())
        ends: tuple[list[Prompt], list[Prompt]] = ([], [])
        for at_memory_end in choices:
            request = scanner.peek_memory_end() if at_memory_end else scanner.peek_compute_end()
            assert request == (waiting.pop() if at_memory_end else waiting.popleft())
            scanner.take(request)
            ends[at_memory_end].append(prompts[request])
        assert scanner.num_waiting == 0
        assert scanner.peek_compute_end() == scanner.peek_memory_end() == NO_REQUEST
        cut = len(ends[False])
        lost = shared_prefix(in_order[cut - 1], in_order[cut]) if 0 < cut < len(in_order) else 0
        assert sum(map(walk_tokens, ends)) == walk_tokens(in_order) + lost


@settings(max_examples=12, deadline=None)
@given(small_jobs.filter(lambda job: len(job[0]) <= 6), st.sampled_from([1.0, 0.9, 0.5]))
def test_no_order_shares_more_than_the_plan_promises_to_keep(
    job: tuple[list[Prompt], list[int]], kept_sharing: float
) -> None:
    """All n! orders, one prompt remembered: the best of them is the tree's, and the plan's stays within its promise."""
    prompts, outputs = job
    best = min(walk_tokens([prompts[request] for request in order]) for order in permutations(range(len(prompts))))
    plan = plan_of(prompts, outputs)
    assert walk_tokens([prompts[request] for request in plan.tree.order]) == best
    lengths = np.array([len(prompt) for prompt in prompts])
    leaves = leaf_costs(plan.tree, COST, COST.compute_s(lengths, outputs), COST.memory_s(lengths, outputs))
    order = order_leaves(plan.tree, COST, leaves, kept_sharing=kept_sharing, tolerance=0.0)
    walked = [prompts[plan.tree.order[plan.tree.leaf_start[leaf]]] for leaf in order.leaves]
    shared = sum(map(len, prompts)) - best
    assert walk_tokens(walked) <= best + (1 - kept_sharing) * shared + 1e-9


def ratio_to_the_best(seed: int) -> float:
    """Time of `blend` on eight requests of three kinds over that of the best of all their orders, admitted as memory
    allows. Below 1 where the feedback on the step's mix wins more than the best order."""
    rng = np.random.default_rng(seed)
    kinds = [(int(rng.choice([3, 40])), int(rng.choice([1, 20, 40]))) for _ in range(3)]
    chosen = [kinds[index % 3] for index in range(MAX_REQUESTS)]
    sizes, outputs = [size for size, _ in chosen], tuple(output for _, output in chosen)
    prompts = [(index, *[0] * (size - 1)) for index, size in enumerate(sizes)]

    def elapsed(policy: Policy) -> float:
        engine = TinyEngine(policy, sizes, outputs, capacity_tokens=260)
        engine.run()
        return engine.elapsed_s

    by_kind = {tuple(chosen[request] for request in order): order for order in permutations(range(MAX_REQUESTS))}
    best = min(elapsed(StaticPolicy("given", ranges(order))) for order in by_kind.values())
    return elapsed(make_policy("blend", plan_of(prompts, outputs))) / best


def test_feedback_stays_near_the_best_of_all_orders_of_eight_requests() -> None:
    """Eight requests are all ramp and tail, the worst case of a policy that is made for the middle."""
    ratios = [ratio_to_the_best(seed) for seed in range(16)]
    assert min(ratios) < 1
    assert float(np.mean(ratios)) < 1.15
    assert max(ratios) < 1.75
