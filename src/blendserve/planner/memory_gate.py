"""Who may hold KV memory: forecasts of the load, with room kept for the compute end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import Floats
from blendserve.planner.forecast import KvForecast
from blendserve.planner.lengths import Lengths
from blendserve.planner.scanner import NO_REQUEST


class MemoryGate:
    """Two forecasts: of all running requests and of those from the memory end. Units: tokens; times are steps.

    `limit`: KV tokens that a forecast may reach. `reserve`: the part of it that the memory end leaves to the compute
    end. `make_forecast` makes an empty forecast.
    """

    def __init__(self, lengths: Lengths, make_forecast: Callable[[], KvForecast] = KvForecast) -> None:
        self.everyone, self.memory_end = make_forecast(), make_forecast()
        self.limit = self.reserve = 0.0
        self._lengths = lengths
        self._outset_of, self._outset_tokens = NO_REQUEST, np.zeros(1)

    def rebuild(self, step: int, own: Floats, remaining: Floats, is_at_memory_end: NDArray[np.bool_]) -> None:
        """Forecast from scratch. Shapes: `own` [n] tokens that each running request holds for itself; `remaining`
        [n, num_quantiles] output tokens to come; `is_at_memory_end` [n]."""
        self._outset_of = NO_REQUEST
        self.everyone.rebuild(step, own, remaining)
        self.memory_end.rebuild(step, own[is_at_memory_end], remaining[is_at_memory_end])

    def has_room(self, request: int, step: int, num_own_tokens: float) -> bool:
        """Does the forecast of all stay within the limit with this request?"""
        return self.everyone.fits(request, step, num_own_tokens, self._outset(request), self.limit)

    def has_room_at_memory_end(self, request: int, step: int, num_own_tokens: float) -> bool:
        """The same, and does the memory end leave the compute end its reserve?"""
        remaining = self._outset(request)
        limit = self.limit - self.reserve
        is_within = self.memory_end.fits(request, step, num_own_tokens, remaining, limit)
        return is_within and self.everyone.fits(request, step, num_own_tokens, remaining, self.limit)

    def enter(self, request: int, step: int, num_own_tokens: float, *, at_memory_end: bool) -> None:
        """Count a request in from this step on."""
        remaining = self._outset(request)
        self.everyone.add(step, num_own_tokens, remaining)
        if at_memory_end:
            self.memory_end.add(step, num_own_tokens, remaining)

    def _outset(self, request: int) -> Floats:
        """Output tokens of a request that has not started. It is kept: who is asked about often enters next."""
        if self._outset_of != request:
            self._outset_of, self._outset_tokens = request, self._lengths.outset(request)
        return self._outset_tokens
