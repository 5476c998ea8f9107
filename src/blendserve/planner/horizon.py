"""When the job can end: the longest request that runs, and the longest that waits."""

from __future__ import annotations

import math

from blendserve.costs.model_cost import Floats
from blendserve.planner.learner import Learner
from blendserve.planner.scanner import DualScanner

LOOK_AGAIN = 0.9
"""Share of the waiting requests that may be left before their longest output is estimated anew."""
NEXT_REQUESTS = 8
"""Requests at an end that count as next."""


class Horizon:
    """Expected last step of what runs, against the longest output that waits. Times are absolute steps."""

    def __init__(self, scanner: DualScanner, learner: Learner) -> None:
        self._scanner = scanner
        self._learner = learner
        self._end = 0.0
        self._longest_unknown, self._num_weighed = 0.0, math.inf

    def enter(self, request: int, step: int) -> None:
        """A request runs from this step on."""
        self._end = max(self._end, step + float(self._learner.schedule.expected_output_tokens[request]))

    def measure_running(self, step: int, first: Floats) -> None:
        """Running requests are expected to have `first` output tokens to come."""
        self._end = step + float(first.max(initial=0.0))

    def forget(self) -> None:
        """Estimates have changed: the longest output that waits is to be found anew."""
        self._num_weighed = math.inf

    def num_idle_steps(self, step: int) -> float:
        """Steps that there will be anyway, because something running is longer than all that waits."""
        return self._end - step - self._longest_waiting()

    def _longest_waiting(self) -> float:
        """Output tokens that the longest waiting request is expected to have: one of the next at the memory end, or the
        longest of many that nothing is known of."""
        num_waiting = self._scanner.num_waiting
        if not num_waiting:
            return 0.0
        if num_waiting < LOOK_AGAIN * self._num_weighed:
            self._num_weighed = num_waiting
            self._longest_unknown = self._learner.lengths.longest_unknown(self._scanner.waiting())
        expected = self._learner.schedule.expected_output_tokens
        known = expected[self._scanner.first_at_memory_end(NEXT_REQUESTS)]
        return max(self._longest_unknown, float(known.max(initial=0.0)))
