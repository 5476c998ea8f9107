"""The KV forecast against step-by-step simulation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracles import kv_loads

from blendserve.planner.forecast import KvForecast

sequences = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=20)


@given(sequences, st.integers(0, 1000))
def test_the_peak_of_known_lengths_is_exact(running: list[tuple[int, int]], step: int) -> None:
    held, remaining = zip(*running, strict=True)
    forecast = KvForecast()
    forecast.rebuild(step, np.array(held, dtype=float), np.array(remaining, dtype=float)[:, None])
    assert abs(forecast.peak - max(kv_loads(held, remaining)[1:])) < 1e-6


@given(sequences, sequences, st.integers(0, 5))
def test_admissions_never_raise_the_true_peak_above_the_limit(
    running: list[tuple[int, int]], waiting: list[tuple[int, int]], delay: int
) -> None:
    """Whatever is said to fit does, some steps after the forecast was made too."""
    forecast = KvForecast()
    held, remaining = [list(column) for column in zip(*running, strict=True)]
    forecast.rebuild(0, np.array(held, dtype=float), np.array(remaining, dtype=float)[:, None])
    survivors = [(tokens + delay, left - delay) for tokens, left in running if left > delay]
    limit = max(forecast.peak, 150.0)
    for request, (tokens, left) in enumerate(waiting):
        if forecast.fits(request, delay, tokens, np.array([float(left)]), limit):
            forecast.add(delay, tokens, np.array([float(left)]))
            survivors.append((tokens, left))
    if survivors:
        loads = kv_loads(*zip(*survivors, strict=True))
        assert max(loads[1:]) <= limit + 1e-6


def test_a_refusal_stands_until_the_next_rebuild() -> None:
    forecast = KvForecast()
    one = np.array([10.0])
    assert not forecast.fits(7, 0, 100, one, 50.0)
    assert not forecast.fits(7, 0, 1, one, 50.0)
    forecast.rebuild(0, np.zeros(0), np.zeros((0, 1)))
    assert forecast.fits(7, 0, 1, one, 50.0)


def test_uncertain_lengths_count_by_their_share() -> None:
    """Two sequences, each of 10 or 30 tokens: both are expected to be half there after step 10."""
    forecast = KvForecast()
    forecast.rebuild(0, np.zeros(2), np.array([[10.0, 30.0], [10.0, 30.0]]))
    assert forecast.peak == 30.0


def test_gaps_before_a_peak_are_filled_one_after_the_other() -> None:
    """One sequence grows to 1000. Shorter ones fit beside it while their sum stays below."""
    forecast = KvForecast()
    forecast.rebuild(0, np.zeros(1), np.array([[1000.0]]))
    for request, length in enumerate((300.0, 450.0)):
        assert forecast.fits(request, 0, 0.0, np.array([length]), 1000.0)
        forecast.add(0, 0.0, np.array([length]))
    assert not forecast.fits(3, 0, 0.0, np.array([400.0]), 1000.0)  # 3 x 400 at step 400
    assert forecast.fits(4, 0, 0.0, np.array([240.0]), 1000.0)  # 4 x 240
    assert not forecast.fits(5, 0, 0.0, np.array([260.0]), 1000.0)
