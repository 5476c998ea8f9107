"""Numbers, durations and shares as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "milliseconds"))


def format_number(value: float) -> str:
    """At most three digits, as ticks have them: 0.035, 1.4, 412, 1.2k, 3M."""
    return _scaled(value, _short)


def format_figure(value: float) -> str:
    """Three digits always, as columns of figures have them: 0.0350, 1.40, 412, 1.20k, 3.00M."""
    return _scaled(value, _three_digits)


def format_count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def format_share(value: float) -> str:
    """A share in percent."""
    return f"{value:.1%}" if abs(value) < 0.9995 else f"{value:.0%}"


def format_duration(seconds: float) -> str:
    """Three digits in the unit that fits: 41.2 ms, 3.14 s, 12.4 min, 5.20 h, 3.40 d."""
    for least, size, unit in ((172800, 86400, "d"), (3600, 3600, "h"), (120, 60, "min"), (1, 1, "s")):
        if seconds >= least:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e3)} ms"


def time_unit(longest_s: float) -> tuple[float, str]:
    """The unit for an axis of times: its seconds and its name."""
    for size, name in _TIME_UNITS:
        if longest_s >= 2 * size:
            return size, name
    return _TIME_UNITS[-1]


def format_bytes(count: float) -> str:
    """Three digits in the unit that fits, in powers of ten: 12.3 kB, 269 MB, 1.07 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size * 0.9995:
            return f"{_three_digits(count / size)} {unit}"
    return f"{_three_digits(count / 1e3)} kB"


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 request, 2 requests."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def _scaled(value: float, digits: Callable[[float], str]) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return digits(value / size) + suffix
    return digits(value)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 or value == 0 else f"{value:#.3g}"


def _short(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    if abs(value) >= 0.0995:
        return f"{value:.3g}"
    return f"{value:.2g}"


def printable(text: str) -> str:
    """A text for a terminal: what would move its cursor, change its title or turn its writing around is shown as an
    escape, such as \\x1b. Line breaks stay.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_line(text: str) -> str:
    """The same for what must stay one line: a line break that came from elsewhere could forge one of ours."""
    return printable(text).replace("\n", "\\n")
