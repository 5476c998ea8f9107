"""Which setting of overlap is kept, and which delays explain what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blendserve.calibration.overlap_trials import OverlapTrial, best_overlap, lanes_to_try
from blendserve.calibration.step_probe import Work
from blendserve.costs.step_cost import SEQUENTIAL, Interference, OverlapCost

DEFAULT = OverlapCost()
OTHER = replace(DEFAULT, iteration_bytes=64)


def trial(cost: OverlapCost, compute_s: float, memory_s: float, on_s: float) -> OverlapTrial:
    def work(elapsed_s: float) -> Work:
        return Work(elapsed_s, compute_s, memory_s, 1.0, 1.0, 1.0, 1.0)

    return OverlapTrial(64, 0, cost, (work(compute_s + memory_s),) * 3, (work(on_s),) * 3)


def test_the_fastest_setting_is_kept() -> None:
    trials = [trial(DEFAULT, 1.0, 1.0, 1.9), trial(OTHER, 1.0, 1.0, 1.5)]
    best = best_overlap(trials, 0.0)
    assert best.iteration_bytes == 64
    assert best.interference.step_s(1.0, 1.0) == pytest.approx(1.5)


def test_delays_are_found_again() -> None:
    """From steps with more compute, as much of both, and more memory."""
    truth = Interference(0.7, 0.4)
    mixes = [(2.0, 1.0), (1.0, 1.0), (1.0, 2.0)]
    trials = [trial(DEFAULT, c, m, truth.step_s(c, m)) for c, m in mixes]
    found = best_overlap(trials, 0.0).interference
    assert (found.compute_delay, found.memory_delay) == pytest.approx((0.7, 0.4))


def test_a_step_of_mostly_memory_says_little_of_the_delay_of_compute() -> None:
    """c + a m is then less than m + b c for any a of a wide range; another step knows better."""
    truth = Interference(0.5, 0.5)
    trials = [trial(DEFAULT, c, m, truth.step_s(c, m)) for c, m in ((0.3, 1.0), (1.0, 0.6))]
    assert best_overlap(trials, 0.0).interference == Interference(0.5, 0.5)


def test_reading_weights_again_is_no_delay() -> None:
    """It costs what arithmetic does not hide: of 0.6 s, twice, a compute time of 1.0 s hides all but 0.2."""
    with_weights = best_overlap([trial(DEFAULT, 1.0, 1.0, 1.6)], 0.6)
    assert with_weights.interference.step_s(1.0, 1.0) == pytest.approx(1.4)
    hidden = best_overlap([trial(DEFAULT, 1.0, 1.0, 1.6)], 0.5)
    assert hidden.interference.step_s(1.0, 1.0) == pytest.approx(1.6)


@pytest.mark.parametrize("on_s", [2.0, 2.3, 1.99])
def test_no_gain_is_sequential(on_s: float) -> None:
    assert best_overlap([trial(DEFAULT, 1.0, 1.0, on_s)], 0.05).interference == SEQUENTIAL


def test_more_than_everything_cannot_be_hidden() -> None:
    assert best_overlap([trial(DEFAULT, 1.0, 1.0, 0.5)], 0.0).interference == Interference(0.0, 0.0)


@pytest.mark.parametrize(
    ("of_one", "of_all", "num_threads", "num_lanes"),
    [(20e9, 460e9, 96, 31), (20e9, 31e9, 2, 0), (20e9, 60e9, 4, 0), (20e9, 30e9, 8, 2)],
)
def test_lanes_are_tried_where_few_threads_saturate_the_memory(
    of_one: float, of_all: float, num_threads: int, num_lanes: int
) -> None:
    assert lanes_to_try({1: of_one, num_threads: of_all}, num_threads) == num_lanes


def test_no_lanes_are_tried_where_one_thread_was_not_measured() -> None:
    assert lanes_to_try({8: 30e9}, 8) == 0
