"""Numbers, durations and shares as people read them."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "milliseconds"))


def format_number(value: float) -> str:
    """About three digits: 0.035, 1.37, 412, 1.2k, 3.4M."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return _digits(value / size) + suffix
    return _digits(value)


def format_count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def format_share(value: float) -> str:
    """A share in percent."""
    return f"{value:.1%}" if abs(value) < 0.9995 else f"{value:.0%}"


def format_duration(seconds: float) -> str:
    """About three digits in the unit that fits: 41.2 ms, 3.14 s, 12.4 min, 5.2 h, 3.4 d."""
    for size, unit in ((86400 * 2, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size * (2 if unit == "min" else 1):
            return f"{_digits(seconds / (86400 if unit == 'd' else size))} {unit}"
    return f"{_digits(seconds * 1e3)} ms"


def time_unit(longest_s: float) -> tuple[float, str]:
    """The unit for an axis of times: its seconds and its name."""
    for size, name in _TIME_UNITS:
        if longest_s >= 2 * size:
            return size, name
    return _TIME_UNITS[-1]


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 request, 2 requests."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def _digits(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:.0f}"
    if magnitude >= 9.995:
        return f"{value:.1f}".removesuffix(".0")
    if magnitude >= 0.0995:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{value:.2g}"
