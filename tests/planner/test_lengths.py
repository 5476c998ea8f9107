"""Estimates of output lengths: hints, caps, samples, shrinkage, and what running requests tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.lengths import LengthModel, MeanLengthModel
from blendserve.planner.strata import choose_samples, find_strata, split_by_prompt
from blendserve.planner.survival import SurvivalTable, hazards, make_edges
from blendserve.planner.tree import PrefixTree

NUM_KINDS = 5
KIND_REQUESTS = 2000


def tree_of_kinds(num_kinds: int = NUM_KINDS, size: int = KIND_REQUESTS) -> PrefixTree:
    """Kinds of requests, each with a system prompt of its own."""
    kind = np.repeat(np.arange(num_kinds), size)
    lcp = np.where(np.diff(kind, prepend=-1) == 0, 400, 0)
    return PrefixTree.from_sorted(np.arange(len(kind)), lcp, np.full(len(kind), 500))


def unknown_table(num_requests: int, cap: int = 4096) -> RequestTable:
    return RequestTable(np.full(num_requests, 500), np.full(num_requests, cap), np.full(num_requests, -1))


def lengths_of_kinds(seed: int = 0) -> Int64s:
    """Lognormal, medians from 20 to 1100 tokens."""
    kind = np.repeat(np.arange(NUM_KINDS), KIND_REQUESTS)
    drawn = np.random.default_rng(seed).lognormal(3 + kind, 0.7)
    return np.clip(drawn.astype(np.int64), 1, 4096)


def rows_of(kind: int) -> Int64s:
    return np.arange(kind * KIND_REQUESTS, (kind + 1) * KIND_REQUESTS)


def observed(model: LengthModel | MeanLengthModel, lengths: Int64s, rows: Int64s) -> None:
    for row in rows.tolist():
        model.observe(row, int(lengths[row]))
    model.refresh()


def test_one_percent_of_every_stratum_is_sampled_and_at_least_one() -> None:
    tree = tree_of_kinds()
    strata = find_strata(tree)
    assert len(strata) == NUM_KINDS + 1
    samples = choose_samples(tree, strata, np.ones(tree.num_requests, dtype=np.bool_), rate=0.01, seed=3)
    assert np.bincount(strata.stratum_of[samples], minlength=6).tolist() == [0, 20, 20, 20, 20, 20]
    assert len(np.unique(samples)) == len(samples)
    few = choose_samples(tree, strata, np.ones(tree.num_requests, dtype=np.bool_), rate=1e-6, seed=3)
    assert np.bincount(strata.stratum_of[few], minlength=6).tolist() == [0, 1, 1, 1, 1, 1]


def test_sampling_depends_on_the_seed_alone() -> None:
    tree = tree_of_kinds()
    first, again, other = (LengthModel(tree, unknown_table(tree.num_requests), seed=seed).samples for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_known_lengths_are_exact_and_never_sampled() -> None:
    tree = tree_of_kinds()
    known = np.where(np.arange(tree.num_requests) % 2 == 0, 77, -1)
    table = RequestTable(np.full(tree.num_requests, 500), np.full(tree.num_requests, 4096), known)
    model = LengthModel(tree, table)
    assert (model.samples % 2 == 1).all()
    assert model.estimate(np.array([0, 2])).tolist() == [77, 77]
    assert model.remaining(np.array([0, 2]), np.array([70, 77])).tolist() == [7, 0]
    assert model.outset(0).tolist() == [77]


@pytest.mark.parametrize("make", [LengthModel, MeanLengthModel])
def test_estimates_respect_caps(make: type[LengthModel] | type[MeanLengthModel]) -> None:
    tree = tree_of_kinds()
    model = make(tree, unknown_table(tree.num_requests, cap=50))
    observed(model, np.full(tree.num_requests, 50), model.samples)
    rows = np.arange(tree.num_requests)
    assert (model.estimate(rows) <= 50).all()
    assert (model.quantiles(rows[:9], np.full(9, 20)) <= 30).all()
    assert (model.remaining(rows[:9], np.full(9, 50)) == 0).all()


@pytest.mark.parametrize("make", [LengthModel, MeanLengthModel])
def test_samples_tell_kinds_apart(make: type[LengthModel] | type[MeanLengthModel]) -> None:
    tree, lengths = tree_of_kinds(), lengths_of_kinds()
    model = make(tree, unknown_table(tree.num_requests), sample_rate=0.05)
    observed(model, lengths, model.samples)
    for kind in range(NUM_KINDS):
        truth = lengths[rows_of(kind)].mean()
        assert model.estimate(rows_of(kind)).mean() == pytest.approx(truth, rel=0.25)


def test_a_distribution_knows_what_is_left_and_its_spread() -> None:
    tree, lengths = tree_of_kinds(), lengths_of_kinds()
    model = LengthModel(tree, unknown_table(tree.num_requests), sample_rate=0.2)
    observed(model, lengths, model.samples)
    rows = rows_of(2)
    first, second = model.moments(rows, np.zeros(len(rows), dtype=np.int64))
    assert first.mean() == pytest.approx(lengths[rows].mean(), rel=0.1)
    assert second.mean() == pytest.approx((lengths[rows].astype(float) ** 2).mean(), rel=0.3)
    survivors = rows[lengths[rows] > 200]
    done = np.full(len(survivors), 200)
    truth = lengths[survivors] - 200
    assert model.remaining(survivors, done).mean() == pytest.approx(truth.mean(), rel=0.2)
    quartiles = model.quantiles(survivors[:1], done[:1])[0]
    assert quartiles == pytest.approx(np.quantile(truth, [0.125, 0.375, 0.625, 0.875]), rel=0.35)


def test_running_requests_correct_the_bias_of_early_finishers() -> None:
    """After 100 steps only short answers are done: their mean is wrong, and the running ones say so."""
    tree, lengths = tree_of_kinds(), lengths_of_kinds()
    model = LengthModel(tree, unknown_table(tree.num_requests), sample_rate=0.2)
    samples = np.intersect1d(model.samples, rows_of(2))
    finished, running = samples[lengths[samples] <= 100], samples[lengths[samples] > 100]
    observed(model, lengths, finished)
    naive = model.estimate(rows_of(2)[:1])[0]
    model.refresh(running, np.full(len(running), 100))
    corrected = model.estimate(rows_of(2)[:1])[0]
    truth = lengths[rows_of(2)].mean()
    assert abs(np.log(corrected / truth)) < 0.7 * abs(np.log(naive / truth))


def test_a_stratum_without_samples_takes_its_parents_estimate() -> None:
    tree, lengths = tree_of_kinds(), lengths_of_kinds()
    for make in (LengthModel, MeanLengthModel):
        model = make(tree, unknown_table(tree.num_requests), sample_rate=0.05)
        observed(model, lengths, np.setdiff1d(model.samples, rows_of(1)))
        root = lengths[np.setdiff1d(model.samples, rows_of(1))].mean()
        assert model.estimate(rows_of(1)[:1])[0] == pytest.approx(root, rel=0.3)


def test_answers_cut_at_the_cap_are_evidence_of_longer_ones() -> None:
    tree = tree_of_kinds()
    cap = np.where(np.arange(tree.num_requests) % 2 == 0, 64, 4096)
    model = LengthModel(tree, RequestTable(np.full(len(cap), 500), cap, np.full(len(cap), -1)))
    for row in range(0, 400, 2):
        model.observe(row, 64)
    model.refresh()
    assert model.estimate(np.array([1]))[0] > 64


@settings(max_examples=50)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_tables_are_sums_over_their_own_survival(lengths: list[int], seed: int) -> None:
    """Moments and quantiles against plain sums over S(n), n = 0, 1, ..."""
    edges = make_edges(400)
    rng = np.random.default_rng(seed)
    table = SurvivalTable.from_hazards(rng.random((2, len(edges) - 1)) * 0.3, edges)
    every = np.arange(int(edges[-1]))
    for stratum in (0, 1):
        beyond = table.survival(np.full(len(every), stratum), every)
        assert (np.diff(beyond) <= 1e-12).all()
        for length in lengths:
            first, second = table.moments_below(np.array([stratum]), np.array([length]))
            assert first[0] == pytest.approx(beyond[:length].sum())
            assert second[0] == pytest.approx(((2 * every + 1) * beyond)[:length].sum())
            level = beyond[length]
            found = table.quantile(np.array([stratum]), np.array([level]))[0]
            assert np.interp(found, every, beyond) == pytest.approx(level, rel=1e-6)


def test_hazards_without_parents_are_the_product_limit_estimate() -> None:
    edges = np.arange(6)
    events = np.array([[2.0, 1.0, 0.0, 1.0, 0.0]]) * 1e6
    at_risk = np.array([[6.0, 4.0, 3.0, 2.0, 1.0]]) * 1e6
    found = hazards(events, at_risk, np.array([-1]), np.array([0]), edges)
    assert found[0, :4] == pytest.approx([2 / 6, 1 / 4, 0, 1 / 2], abs=1e-5)


@pytest.mark.parametrize("kind", [LengthModel, MeanLengthModel])
def test_refused_requests_tell_nothing(kind: type[LengthModel | MeanLengthModel]) -> None:
    tree = tree_of_kinds()
    model = kind(tree, unknown_table(tree.num_requests))
    before = model.estimate(np.arange(tree.num_requests)).copy()
    for row in model.samples.tolist():
        model.observe(row, 0)
    model.refresh()
    assert (model.estimate(np.arange(tree.num_requests)) == before).all()
    assert model.num_observed == 0


def test_the_longest_of_many_is_expected_near_their_longest() -> None:
    tree, lengths = tree_of_kinds(), lengths_of_kinds()
    model = LengthModel(tree, unknown_table(tree.num_requests))
    for index in range(0, tree.num_requests, 10):
        model.observe(index, int(lengths[index]))
    model.refresh()
    waiting = rows_of(2)
    assert lengths[waiting].max() / 2 < model.longest_unknown(waiting) < 2 * lengths[waiting].max()
    assert model.longest_unknown(waiting[:4]) < model.longest_unknown(waiting)
    assert model.longest_unknown(waiting[:0]) == 0
    capped = LengthModel(tree, unknown_table(tree.num_requests, cap=50))
    assert capped.longest_unknown(waiting) <= 50


def test_known_lengths_are_not_among_the_unknown_ones() -> None:
    tree = tree_of_kinds()
    known = np.where(np.arange(tree.num_requests) < KIND_REQUESTS, 900, -1)
    table = RequestTable(np.full(tree.num_requests, 500), np.full(tree.num_requests, 4096), known)
    for model in (LengthModel(tree, table), MeanLengthModel(tree, table)):
        assert model.longest_unknown(rows_of(0)) == 0
        assert model.longest_unknown(rows_of(1)) > 0


def test_long_prompts_that_finish_first_do_not_speak_for_short_ones() -> None:
    """One prefix for all; prompts of 1000 tokens get long answers and are served first, those of 100 get short ones."""
    prompts = np.repeat([100, 1000], 400)
    tree = PrefixTree.from_sorted(np.arange(800), np.append(0, np.full(799, 50)), prompts)
    table = RequestTable(prompts, np.full(800, 4096), np.full(800, -1))
    lengths = np.where(prompts == 1000, 500, 5)
    model = LengthModel(tree, table)
    observed(model, lengths, np.union1d(model.samples, np.arange(400, 800)))
    assert model.estimate(np.array([0]))[0] < 150
    assert model.estimate(np.array([799]))[0] > 300


def test_strata_are_split_by_prompts_where_parts_are_large() -> None:
    prompts = np.concatenate([np.full(300, 100), np.full(300, 900), np.full(20, 5000)])
    tree = PrefixTree.from_sorted(np.arange(620), np.append(0, np.full(619, 50)), prompts)
    strata = split_by_prompt(find_strata(tree), prompts)
    assert strata.parent.tolist() == [-1, 0, 0]
    assert strata.level.tolist() == [0, 1, 1]
    assert np.unique(strata.stratum_of[:300]).tolist() == [1]
    assert np.unique(strata.stratum_of[300:600]).tolist() == [2]
    assert np.unique(strata.stratum_of[600:]).tolist() == [0], "too few to say anything of their own"
