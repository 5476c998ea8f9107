"""Charts: where marks land, which ticks are chosen, and what is escaped."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.report.svg import MAX_POINTS, Axis, Chart, linear_ticks, log_ticks

LEFT, RIGHT, TOP, BOTTOM = 58, 640 - 12, 26, 240 - 40  # of a chart of the usual size


def chart(x: Axis | None = None, y: Axis | None = None) -> Chart:
    return Chart(x or Axis("x", 0, 10), y or Axis("y", 0, 100), label="a chart")


def points_of(markup: str) -> list[tuple[float, float]]:
    (found,) = re.findall(r'<polyline points="([^"]*)"', markup)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]


def test_points_land_where_the_axes_say() -> None:
    drawing = chart()
    drawing.line(np.array([0.0, 5.0, 10.0]), np.array([0.0, 50.0, 100.0]), "compute")
    middle = ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)
    assert points_of(drawing.render()) == [(LEFT, BOTTOM), middle, (RIGHT, TOP)]


def test_log_axes_and_values_outside() -> None:
    axis = Axis("density", 0.01, 100, is_log=True)
    assert axis.fractions([0.01, 1, 100, 1e9, 0]) == pytest.approx([0, 0.5, 1, 1, 0])
    assert axis.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_a_line_breaks_where_there_is_no_number() -> None:
    drawing = chart()
    drawing.line(np.arange(5.0), np.array([1, 2, np.nan, 3, 4]), "memory")
    assert drawing.render().count("<polyline") == 2


def test_bars_rules_blocks_and_tooltips() -> None:
    drawing = chart()
    drawing.bars(np.array([0.0, 5.0, 10.0]), np.array([100.0, 0.0]), "third", ["first <b>", "second"], "named")
    drawing.block((0, 5), (0, 50), "memory", 0.5, "block & title")
    drawing.rule(50, "half")
    drawing.rule(500, "far away")
    drawing.hover(np.array([0.0, 10.0]), ["column"])
    drawing.text(1, 1, "<label>")
    markup = drawing.render()
    assert "<title>first &lt;b&gt;</title>" in markup
    assert "second" not in markup, "an empty bar is not drawn"
    assert "block &amp; title" in markup
    assert ">half<" in markup
    assert "far away" not in markup
    assert "&lt;label&gt;" in markup
    assert 'class="hover"><title>column' in markup
    assert ">named<" in markup


def test_long_series_are_refused() -> None:
    with pytest.raises(AssertionError, match="thin"):
        chart().line(np.arange(MAX_POINTS + 1.0), np.arange(MAX_POINTS + 1.0), "compute")


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    if not high - low > 1e-9 * abs(low):
        return
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    steps = np.diff(ticks)
    assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-6)
    leading = f"{steps[0]:.3e}"[:4]
    assert leading in ("1.00", "2.00", "5.00")


@given(st.floats(1e-6, 1e3), st.floats(1.5, 1e12))
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) <= 10
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in ticks)
    assert len(ticks) >= 1 or ratio < 3
