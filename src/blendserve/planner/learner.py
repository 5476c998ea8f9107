"""What a running policy knows of lengths, and when it is time to plan again."""

from __future__ import annotations

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s, SchedulerView
from blendserve.planner.plan import Plan
from blendserve.planner.schedule import Schedule

REFRESH_GROWTH = 1.1
"""Estimates are refreshed whenever this many times more requests have finished than at the last refresh."""
MIN_NEW_OBSERVATIONS = 16
REPLAN_DRIFT = 0.1
"""The rest is planned anew when estimates of the waiting requests have moved by this share of their total."""


class Learner:
    """Collects finished lengths, refreshes the estimates, and makes a new schedule when they have moved enough.

    Refreshes grow rarer as evidence grows, so a run of n requests plans O(log n) times.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.lengths = plan.new_lengths()
        self.schedule = plan.schedule
        self._next_refresh = MIN_NEW_OBSERVATIONS
        self.num_replans = 0

    @property
    def is_due(self) -> bool:
        """Is there enough new evidence to look at?"""
        return self.lengths.num_observed >= self._next_refresh

    def refresh(self, view: SchedulerView, waiting: Int64s) -> Schedule | None:
        """Take in all evidence; returns a new schedule when the rest should be planned anew. Mutates: estimates."""
        self.lengths.refresh(view.request_index, view.num_output_tokens)
        observed = self.lengths.num_observed
        self._next_refresh = max(observed + MIN_NEW_OBSERVATIONS, int(observed * REFRESH_GROWTH))
        if self._drift(waiting) < REPLAN_DRIFT:
            return None
        self.schedule = self._plan.reschedule(self.lengths)
        self.num_replans += 1
        return self.schedule

    def _drift(self, waiting: Int64s) -> float:
        planned: Floats = self.schedule.expected_output_tokens[waiting]
        moved = np.abs(self.lengths.estimate(waiting) - planned).sum()
        return float(moved / max(float(planned.sum()), 1.0))
