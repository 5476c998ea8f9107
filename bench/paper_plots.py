"""Plots of `bench/paper.py` as stand-alone SVG files: grouped bars, lines, heat maps. Nothing but strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#9aa4af", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 340, 56, 16, 54, 40
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM


def bars(title: str, unit: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """Groups of bars. `values`: group -> series -> value; every group has the same series."""
    series = list(next(iter(values.values())))
    top = 1.08 * max(value for group in values.values() for value in group.values())
    parts = [*_axes(title, unit, 0, top), *_legend(series)]
    group_width = _PLOT_WIDTH / len(values)
    bar = 0.82 * group_width / len(series)
    for index, (group, by_series) in enumerate(values.items()):
        left = _LEFT + index * group_width + 0.09 * group_width
        for place, name in enumerate(series):
            height = by_series[name] / top * _PLOT_HEIGHT
            x, y = left + place * bar, _TOP + _PLOT_HEIGHT - height
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar * 0.92:.1f}" height="{height:.1f}" fill="{_colour(place)}">'
                f"<title>{escape(group)}, {escape(name)}: {by_series[name]:.3g}</title></rect>"
            )
            if bar > 22:
                parts.append(_text(x + bar * 0.46, y - 3, f"{by_series[name]:.3g}", size=9, anchor="middle"))
        parts.append(_text(left + 0.41 * group_width, _HEIGHT - 20, group, anchor="middle"))
    return _document(parts)


def lines(
    title: str, unit: str, x: Sequence[float], values: Mapping[str, Sequence[float]], *, x_label: str, low: float = 0.0
) -> str:
    """One line per series over common x."""
    top = 1.05 * max(max(column) for column in values.values())
    parts = [*_axes(title, unit, low, top), *_legend(list(values))]
    span = max(x) - min(x) or 1.0
    for place, column in enumerate(values.values()):
        points = " ".join(
            f"{_LEFT + (at - min(x)) / span * _PLOT_WIDTH:.1f},"
            f"{_TOP + (1 - (max(value, low) - low) / (top - low)) * _PLOT_HEIGHT:.1f}"
            for at, value in zip(x, column, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(place)}" stroke-width="1.6"/>')
    for step in range(6):
        at = min(x) + span * step / 5
        parts.append(_text(_LEFT + step / 5 * _PLOT_WIDTH, _HEIGHT - 22, f"{at:.4g}", anchor="middle"))
    parts.append(_text(_LEFT + _PLOT_WIDTH / 2, _HEIGHT - 6, x_label, anchor="middle"))
    return _document(parts)


def heat_map(title: str, columns: Sequence[str], rows: Sequence[str], values: Mapping[tuple[str, str], float]) -> str:
    """Cells by (row, column), from pale (least) to dark (most); those without a value stay empty."""
    least, most = min(values.values()), max(values.values())
    parts = [_text(_LEFT, 20, title, size=14)]
    width, height = _PLOT_WIDTH / len(columns), _PLOT_HEIGHT / len(rows)
    for down, row in enumerate(rows):
        parts.append(_text(_LEFT - 6, _TOP + (down + 0.6) * height, row, anchor="end"))
        for across, column in enumerate(columns):
            if (row, column) not in values:
                continue
            value = values[row, column]
            weight = (value - least) / ((most - least) or 1)
            x, y = _LEFT + across * width, _TOP + down * height
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" fill="#0072b2" '
                f'fill-opacity="{0.12 + 0.78 * weight:.2f}"/>'
            )
            ink = "#ffffff" if weight > 0.55 else "#1b1f24"
            parts.append(_text(x + width / 2, y + height / 2 + 4, f"{value:.3f}", size=10, anchor="middle", ink=ink))
    for across, column in enumerate(columns):
        parts.append(_text(_LEFT + (across + 0.5) * width, _TOP - 6, column, anchor="middle"))
    return _document(parts)


def _axes(title: str, unit: str, low: float, top: float) -> list[str]:
    parts = [_text(_LEFT, 20, title, size=14)]
    for step in range(6):
        y = _TOP + _PLOT_HEIGHT * (1 - step / 5)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{low + (top - low) * step / 5:.3g}", anchor="end"))
    parts.append(_text(_LEFT - 6, _TOP - 8, unit, anchor="end"))
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT + 20)
    for place, name in enumerate(names):
        parts.append(f'<rect x="{x:.0f}" y="30" width="11" height="11" fill="{_colour(place)}"/>')
        parts.append(_text(x + 15, 40, name))
        x += 30 + 6.4 * len(name)
    return parts


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", ink: str = "#1b1f24") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{ink}">{escape(text)}</text>'


def _document(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui, sans-serif">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )
