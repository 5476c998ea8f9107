"""Charts as inline SVG: axes with ticks, lines, bands, bars, legends, and tooltips through `<title>`.

Colours are classes of the page's style sheet (compute, memory, third, fourth, plain), so that charts follow the
page's light and dark dress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.report.format import format_number
from blendserve.report.html import Html, element, join

Floats = NDArray[np.float64]

MAX_POINTS = 1500
_TICKS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 26, 40


@dataclass(frozen=True, slots=True)
class Axis:
    """What one direction of a chart stands for. Values outside [low, high] are drawn at its ends."""

    label: str
    low: float
    high: float
    is_log: bool = False
    format: Callable[[float], str] = format_number

    def __post_init__(self) -> None:
        assert self.high > self.low, "an axis needs room"
        assert self.low > 0 or not self.is_log, "a log axis is positive"

    def fractions(self, values: Floats | Sequence[float]) -> Floats:
        """Where values lie between the ends, 0 to 1."""
        clipped = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            return (np.log(clipped) - low) / (high - low)
        return (clipped - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the axis, about half a dozen."""
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * count for count in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, thinned out where there are many; with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / _TICKS))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    candidates = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in candidates if low * 0.999 <= tick <= high * 1.001]


class Chart:
    """One chart. Marks lie over each other in the order they are added. Units of the drawing: pixels."""

    def __init__(self, x: Axis, y: Axis, *, label: str, size: tuple[int, int] = (640, 240)) -> None:
        self._x, self._y = x, y
        self._label = label
        self._width, self._height = size
        self._marks: list[Html] = []
        self._legend: list[tuple[str, str]] = []

    def line(self, xs: Floats, ys: Floats, style: str, name: str = "") -> None:
        """A line through the points, left out where they are not numbers."""
        self._name(style, name)
        for part in _runs(np.isfinite(ys)):
            points = self._points(xs[part], ys[part])
            self._marks.append(element("polyline", _title(name), points=points, class_=f"line {style}"))

    def band(self, xs: Floats, low: Floats, high: Floats, style: str, name: str = "", *, opacity: float = 0.25) -> None:
        """The area between two lines."""
        self._name(style, name)
        for part in _runs(np.isfinite(low) & np.isfinite(high)):
            points = self._points(xs[part], high[part]) + " " + self._points(xs[part][::-1], low[part][::-1])
            self._marks.append(
                element("polygon", _title(name), points=points, class_=f"fill {style}", fill_opacity=opacity)
            )

    def area(self, xs: Floats, ys: Floats, style: str, name: str = "") -> None:
        """A line and the area down to the axis."""
        self.band(xs, np.where(np.isfinite(ys), self._y.low, np.nan), ys, style, name)
        self.line(xs, ys, style)

    def bars(self, edges: Floats, heights: Floats, style: str, titles: Sequence[str], name: str = "") -> None:
        """Bars between neighbouring edges, each with a tooltip."""
        self._name(style, name)
        left, right = self._across(edges[:-1]), self._across(edges[1:])
        top, bottom = self._down(heights), self._height - _BOTTOM
        for begin, end, at, title in zip(left, right, top, titles, strict=True):
            if at < bottom:
                self._rect(begin, at, max(end - begin - 1, 0.5), bottom - at, title, f"fill {style}", 0.75)

    def block(self, x: tuple[float, float], y: tuple[float, float], style: str, opacity: float, title: str) -> None:
        """A rectangle between two values on each axis."""
        left, right = self._across(np.array(x))
        bottom, top = self._down(np.array(y))
        self._rect(left, top, right - left, bottom - top, title, f"node fill {style}", opacity)

    def text(self, x: float, y: float, text: str) -> None:
        """A label that begins right of a point."""
        left, top = float(self._across(np.array([x]))[0]), float(self._down(np.array([y]))[0])
        self._marks.append(element("text", text, x=left + 4, y=top + 4, class_="strong"))

    def rule(self, y: float, label: str) -> None:
        """A dashed line across, with its meaning at the right end."""
        if self._y.low <= y <= self._y.high:
            at = float(self._down(np.array([y]))[0])
            right = self._width - _RIGHT
            self._marks.append(element("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="reference"))
            self._marks.append(element("text", label, x=right - 3, y=at - 4, text_anchor="end", class_="strong"))

    def hover(self, edges: Floats, titles: Sequence[str]) -> None:
        """Tooltips for whole columns."""
        left, right = self._across(edges[:-1]), self._across(edges[1:])
        for begin, end, title in zip(left, right, titles, strict=True):
            self._rect(begin, _TOP, end - begin, self._height - _TOP - _BOTTOM, title, "hover", None)

    def render(self) -> Html:
        """The drawing."""
        return element(
            "svg",
            *self._grid(),
            *self._marks,
            *self._key(),
            viewBox=f"0 0 {self._width} {self._height}",
            style=f"min-width:{0.75 * self._width:.0f}px",
            role="img",
            aria_label=self._label,
        )

    def _grid(self) -> list[Html]:
        bottom, right = self._height - _BOTTOM, self._width - _RIGHT
        parts = []
        y_ticks, x_ticks = self._y.ticks(), self._x.ticks()
        for tick, at in zip(y_ticks, self._down(np.array(y_ticks)), strict=True):
            parts.append(element("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="gridline"))
            parts.append(element("text", self._y.format(tick), x=_LEFT - 6, y=at + 4, text_anchor="end"))
        for tick, at in zip(x_ticks, self._across(np.array(x_ticks)), strict=True):
            parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(element("text", self._x.format(tick), x=at, y=bottom + 17, text_anchor="middle"))
        parts.append(element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
        middle = (_LEFT + right) / 2
        parts.append(element("text", self._x.label, x=middle, y=self._height - 6, text_anchor="middle"))
        parts.append(element("text", self._y.label, x=2, y=13))
        return parts

    def _key(self) -> list[Html]:
        at: float = self._width - _RIGHT
        parts: list[Html] = []
        for style, name in reversed(self._legend):
            at -= 7 * len(name) + 26
            parts.append(element("rect", x=at, y=5, width=12, height=9, class_=f"fill {style}"))
            parts.append(element("text", name, x=at + 16, y=13.5, class_="strong"))
        return parts

    def _name(self, style: str, name: str) -> None:
        if name:
            self._legend.append((style, name))

    def _rect(
        self, x: float, y: float, width: float, height: float, title: str, style: str, opacity: float | None
    ) -> None:
        shape = element(
            "rect",
            _title(title),
            x=float(x),
            y=float(y),
            width=float(width),
            height=float(height),
            class_=style,
            fill_opacity=opacity,
        )
        self._marks.append(shape)

    def _across(self, values: Floats) -> Floats:
        return _LEFT + self._x.fractions(values) * (self._width - _LEFT - _RIGHT)

    def _down(self, values: Floats) -> Floats:
        bottom = self._height - _BOTTOM
        return bottom - self._y.fractions(values) * (bottom - _TOP)

    def _points(self, xs: Floats, ys: Floats) -> str:
        assert len(xs) <= MAX_POINTS, "thin the series out first"
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(self._across(xs), self._down(ys), strict=True))


def _title(text: str) -> Html:
    return element("title", text) if text else join(())


def _runs(is_number: NDArray[np.bool_]) -> list[slice]:
    """Unbroken stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_number, [False])).astype(np.int8)))
    return [slice(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
