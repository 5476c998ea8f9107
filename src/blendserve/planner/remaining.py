"""What remains of a job: the compute and the memory time of requests that wait and of those that run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s
from blendserve.planner.plan import Plan
from blendserve.planner.schedule import Schedule

TRUST_TOKENS = 256
"""Prompt tokens that must have been planned before the sharing found in the engine outweighs the planned sharing."""


class Remaining:
    """Sums over waiting requests, kept as they enter and come back, and over running ones, as last measured.

    Waiting requests count as planned. What runs is counted as planned from its admission until `measure_running`.
    `check` compares the sums with `scratch`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.running_compute_s = self.running_memory_s = 0.0
        self._planned_tokens = self._actual_tokens = float(TRUST_TOKENS)
        self.replan(plan.schedule, np.arange(plan.num_requests))

    def replan(self, schedule: Schedule, waiting: Int64s) -> None:
        """Go on with another schedule, of which these requests wait."""
        self._schedule = schedule
        self._waiting_compute_s = float(schedule.compute_s[waiting].sum())
        self._waiting_memory_s = float(schedule.memory_s[waiting].sum())
        self._waiting_prefill_s = float(self._prefill_s(waiting).sum())

    @property
    def compute_s(self) -> float:
        """Compute of the rest, where waiting requests find as much in the prefix cache as those before them did."""
        sharing_lost = self._actual_tokens / self._planned_tokens - 1.0
        waiting_s = self._waiting_compute_s + sharing_lost * self._waiting_prefill_s
        return max(waiting_s + self.running_compute_s, 0.0)

    @property
    def memory_s(self) -> float:
        """Memory time of the rest."""
        return self._waiting_memory_s + self.running_memory_s

    def enter(self, request: int, num_own_tokens: int) -> None:
        """A waiting request runs; it found all but `num_own_tokens` of its prompt in the prefix cache."""
        schedule = self._schedule
        self._waiting_compute_s -= float(schedule.compute_s[request])
        self._waiting_memory_s -= float(schedule.memory_s[request])
        self._waiting_prefill_s -= float(self._prefill_s(request))
        self.running_compute_s += float(schedule.compute_s[request])
        self.running_memory_s += float(schedule.memory_s[request])
        self._planned_tokens += float(self.own_tokens(request))
        self._actual_tokens += num_own_tokens

    def put_back(self, request: int) -> None:
        """A running request waits again."""
        self._waiting_compute_s += float(self._schedule.compute_s[request])
        self._waiting_memory_s += float(self._schedule.memory_s[request])
        self._waiting_prefill_s += float(self._prefill_s(request))

    def measure_running(self, num_pending_tokens: int, held: Int64s, first: Floats, squared: Floats) -> None:
        """Count what runs by what is left of it: prompt tokens to compute, and by running request the tokens held and
        the expected output tokens to come and their square."""
        cost = self._plan.cost
        self.running_compute_s = cost.token_s * num_pending_tokens + cost.decode_s * float(first.sum())
        self.running_memory_s = cost.kv_token_s * float((held * first + squared / 2).sum())

    def own_tokens(self, requests: Int64s | int) -> Int64s:
        """Prompt tokens that are planned to be computed, once all requests before them have been."""
        own: Int64s = self._plan.table.num_prompt_tokens[requests] - self._schedule.num_shared_tokens[requests]
        return own

    def are_memory_intensive(self, requests: Int64s | int) -> NDArray[np.bool_]:
        """Is their density below that of the remaining job?"""
        compute_s = self._waiting_compute_s + self.running_compute_s
        schedule = self._schedule
        return schedule.compute_s[requests] * self.memory_s < compute_s * schedule.memory_s[requests]

    def check(self, waiting: Int64s) -> None:
        """Assert that the sums are those of the waiting requests. For tests."""
        schedule = self._schedule
        assert np.isclose(self._waiting_compute_s, schedule.compute_s[waiting].sum(), atol=1e-9)
        assert np.isclose(self._waiting_memory_s, schedule.memory_s[waiting].sum(), atol=1e-9)
        assert np.isclose(self._waiting_prefill_s, self._prefill_s(waiting).sum(), atol=1e-9)

    def _prefill_s(self, requests: Int64s | int) -> Floats:
        """Compute of requests before their decodes."""
        schedule = self._schedule
        decode_s = self._plan.cost.decode_s * schedule.expected_output_tokens[requests]
        prefill_s: Floats = np.maximum(schedule.compute_s[requests] - decode_s, 0.0)
        return prefill_s
