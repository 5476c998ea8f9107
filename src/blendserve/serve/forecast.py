"""When batches will end: made anew every second, or less often where so many wait that it would cost engine time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from blendserve.serve.caller import Caller
from blendserve.serve.clock import Clock
from blendserve.serve.queue import Waiting, finish_times

_PERIOD_S = 1.0
_SHARE = 0.002
"""At most this share of a core goes to forecasts."""


class Forecast:
    """`waiting` lists the batches in progress; `rates` are requests per second by model."""

    def __init__(self, waiting: Callable[[], list[Waiting]], rates: Mapping[str, float], clock: Clock) -> None:
        self._waiting = waiting
        self._rates = rates
        self._clock = clock
        self._ends: Mapping[str, float] = {}
        self._fresh_until_s = 0.0

    def ends(self) -> Mapping[str, float]:
        """When each batch would end, as far as is known. Unix times by batch."""
        now_s = time.monotonic()
        if now_s >= self._fresh_until_s:
            self._ends = finish_times(self._waiting(), self._rates, self._clock())
            took_s = time.monotonic() - now_s
            self._fresh_until_s = now_s + max(_PERIOD_S, took_s / _SHARE)
        return self._ends

    def newcomer_s(self, caller: Caller, model: str | None, num_lines: int, deadline: float) -> float | None:
        """Seconds until a batch that came now would end; None where nothing is known."""
        if model is None or model not in self._rates:
            return None
        now = self._clock()
        newcomer = Waiting("new", caller.owner, model, num_lines, deadline, now)
        return finish_times([*self._waiting(), newcomer], self._rates, now)["new"] - now
