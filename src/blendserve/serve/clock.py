"""The service's time: Unix seconds that only move forward while it runs, whatever is done to the system's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns Unix seconds."""


def steady_clock(wall: Clock = time.time, monotonic: Clock = time.monotonic) -> Clock:
    """A clock that reads the system's time once and counts on from there."""
    started, ticks = wall(), monotonic()
    return lambda: started + (monotonic() - ticks)
