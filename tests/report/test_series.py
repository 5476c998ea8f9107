"""Slices of long series: totals are kept, values are those of a plain walk."""

from __future__ import annotations

import numpy as np
import pytest

from blendserve.report.format import (
    format_bytes,
    format_duration,
    format_figure,
    format_number,
    format_share,
    plural,
    time_unit,
)
from blendserve.report.plan_text import finite
from blendserve.report.series import log_histogram, means_along, slice_steps, spread_along


def steps_of(num_steps: int, seed: int = 0) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    rng = np.random.default_rng(seed)
    elapsed = rng.random(num_steps) + 0.01
    return {
        "end_s": np.cumsum(elapsed),
        "elapsed_s": elapsed,
        "compute_s": elapsed * rng.random(num_steps),
        "memory_s": elapsed * rng.random(num_steps),
        "num_kv_tokens": rng.integers(0, 1000, num_steps).astype(np.float64),
        "num_prefill_tokens": rng.integers(0, 100, num_steps).astype(np.float64),
        "num_decode_tokens": rng.integers(0, 100, num_steps).astype(np.float64),
        "num_running": rng.integers(1, 100, num_steps).astype(np.float64),
    }


@pytest.mark.parametrize("num_slices", [1, 7, 100, 5000])
def test_slices_keep_the_totals(num_slices: int) -> None:
    steps = steps_of(300)
    line = slice_steps(steps, 1000, num_slices)
    width = np.diff(line.edges_s)
    assert len(width) == min(num_slices, 300)
    assert line.edges_s[-1] == pytest.approx(steps["end_s"][-1])
    assert (line.compute_share * width).sum() == pytest.approx(steps["compute_s"].sum())
    assert (line.memory_share * width).sum() == pytest.approx(steps["memory_s"].sum())
    assert line.num_steps.sum() == pytest.approx(300)
    assert line.num_prefill_tokens.sum() == pytest.approx(steps["num_prefill_tokens"].sum())
    assert line.num_decode_tokens.sum() == pytest.approx(steps["num_decode_tokens"].sum())
    assert (line.kv_share * width).sum() * 1000 == pytest.approx((steps["num_kv_tokens"] * steps["elapsed_s"]).sum())
    assert (line.compute_ms * line.num_steps).sum() == pytest.approx(1e3 * steps["compute_s"].sum())


def test_a_slice_is_what_a_walk_over_its_steps_finds() -> None:
    steps = {
        "end_s": np.array([1.0, 2.0, 4.0]),
        "elapsed_s": np.array([1.0, 1.0, 2.0]),
        "compute_s": np.array([0.5, 0.1, 2.0]),
        "memory_s": np.array([0.5, 0.0, 1.0]),
        "num_kv_tokens": np.array([10.0, 20.0, 30.0]),
        "num_prefill_tokens": np.array([5.0, 0.0, 8.0]),
        "num_decode_tokens": np.array([1.0, 2.0, 3.0]),
        "num_running": np.array([1.0, 2.0, 4.0]),
    }
    line = slice_steps(steps, 100, 2)
    assert line.compute_share == pytest.approx([0.3, 1.0])
    assert line.kv_share == pytest.approx([0.15, 0.3])
    assert line.density == pytest.approx([0.6 / 0.5, 2.0])
    assert line.compute_ms == pytest.approx([300, 2000])
    assert line.middles_s == pytest.approx([1.0, 3.0])
    assert line.num_prefill_tokens == pytest.approx([5, 8])
    assert line.num_decode_tokens == pytest.approx([3, 3])
    assert line.num_running == pytest.approx([1.5, 4])


def test_spread_and_means_along_an_order() -> None:
    values = np.arange(1000.0)
    spread = spread_along(values, 10)
    assert spread.edges.tolist() == list(range(0, 1001, 100))
    assert spread.median[0] == 49
    assert spread.low[0] == 4
    assert spread.high[9] == 994
    edges, means = means_along(values, 4)
    assert means == pytest.approx([values[begin : begin + 250].mean() for begin in (0, 250, 500, 750)])
    assert len(spread_along(values[:3], 10).median) == 3
    assert edges[-1] == 1000


@pytest.mark.parametrize("values", [[5], [1, 1, 1], [1, 10, 100, 1000], [3.5, 2.5]])
def test_histograms_hold_every_value(values: list[float]) -> None:
    edges, counts = log_histogram(np.array(values, dtype=np.float64))
    assert counts.sum() == len(values)
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_number(0), "0"),
        (format_number(0.0351), "0.035"),
        (format_number(1.3721), "1.37"),
        (format_number(412.4), "412"),
        (format_number(999.7), "1k"),
        (format_number(1234567), "1.23M"),
        (format_number(float("inf")), "∞"),
        (format_bytes(269_340_000), "269 MB"),
        (format_bytes(1.0737e9), "1.07 GB"),
        (format_bytes(999_999_999), "1.00 GB"),
        (format_bytes(12_300), "12.3 kB"),
        (format_duration(0.0412), "41.2 ms"),
        (format_duration(3.14159), "3.14 s"),
        (format_duration(100), "100 s"),
        (format_duration(600), "10.0 min"),
        (format_duration(7200), "2.00 h"),
        (format_duration(86400 * 3), "3.00 d"),
        (format_duration(0), "0 ms"),
        (format_figure(1.5), "1.50"),
        (format_figure(12000), "12.0k"),
        (format_figure(0.0175), "0.0175"),
        (format_share(0.1234), "12.3%"),
        (format_share(1.0), "100%"),
        (plural(1, "request"), "1 request"),
        (plural(2000, "request"), "2,000 requests"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_time_units_of_axes() -> None:
    assert time_unit(0.5) == (1e-3, "milliseconds")
    assert time_unit(100) == (1.0, "seconds")
    assert time_unit(1e5) == (3600.0, "hours")


def test_json_has_no_infinity() -> None:
    value = {"a": float("inf"), "b": [float("nan"), 1.5, "text"], "c": {"d": (2, None)}}
    assert finite(value) == {"a": None, "b": [None, 1.5, "text"], "c": {"d": [2, None]}}
