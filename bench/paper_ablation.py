"""Policy `blend` with one ingredient taken out at a time: what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.planner.base import Int64s, Policy, SchedulerView
from blendserve.planner.blend import BlendPolicy
from blendserve.planner.forecast import KvForecast
from blendserve.planner.plan import Plan
from blendserve.planner.schedule import Schedule

DENSE_SHARE = 0.99
"""Of the dense requests, who comes before the tail: the last subtrees may hold a few."""


class WithoutBalance(BlendPolicy):
    """Every step is filled up, whatever it reads."""

    def _begin_step(self, view: SchedulerView) -> None:
        super()._begin_step(view)
        self._budget = view.max_num_batched_tokens


class AverageLoad(KvForecast):
    """Takes every sequence for its average size at all times: what admission by p + d / 2 does."""

    def __init__(self) -> None:
        super().__init__()
        self._total = 0.0

    def rebuild(self, step: int, kv_tokens: Floats, remaining: Floats) -> None:
        super().rebuild(step, kv_tokens, remaining)
        self._total = float(kv_tokens.sum() + remaining.mean(axis=1).sum() / 2) if len(remaining) else 0.0

    def fits(self, request: int, step: int, kv_tokens: float, remaining: Floats, limit: float) -> bool:  # noqa: ARG002
        return self._total + kv_tokens + float(remaining.mean()) / 2 <= limit

    def add(self, step: int, kv_tokens: float, remaining: Floats) -> None:
        super().add(step, kv_tokens, remaining)
        self._total += kv_tokens + float(remaining.mean()) / 2


class WithoutForecast(BlendPolicy):
    """Admits by average size, not by the peak that is ahead."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._all, self._memory_end = AverageLoad(), AverageLoad()


class ShortestFirst(BlendPolicy):
    """The memory end is walked from its inner end: the longest requests enter last."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._scanner.reorder(turned(self._schedule))

    def _replan(self, view: SchedulerView) -> None:
        before = self._schedule
        super()._replan(view)
        if self._schedule is not before:
            self._scanner.reorder(turned(self._schedule))


def turned(schedule: Schedule) -> Int64s:
    """The order with its memory-intensive tail turned round: what comes after nearly all dense requests."""
    is_dense = (schedule.density >= schedule.root_density)[schedule.order]
    begin = int(np.searchsorted(np.cumsum(is_dense), DENSE_SHARE * is_dense.sum()))
    return np.concatenate([schedule.order[:begin], schedule.order[begin:][::-1]])


class LeastRecentlyUsed(BlendPolicy):
    """Evicts prefix blocks by age."""

    def next_use(self, key: Hashable) -> float:  # noqa: ARG002
        return 0.0


class PlannedOnce(BlendPolicy):
    """Orders anew once, when the first lengths are known, and never after; estimates go on learning."""

    def _replan(self, view: SchedulerView) -> None:
        if not self.num_replans:
            super()._replan(view)
        else:
            self._learner.refresh(view, self._scanner.waiting())


ABLATIONS: dict[str, Callable[[Plan], Policy]] = {
    "blend": BlendPolicy,
    "without balance": WithoutBalance,
    "without forecast": WithoutForecast,
    "shortest first": ShortestFirst,
    "LRU eviction": LeastRecentlyUsed,
    "planned once": PlannedOnce,
}
"""Means instead of distributions is a kind of knowledge: `means of samples` in `paper_cells.KNOWLEDGE`."""
