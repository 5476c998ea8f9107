"""What a replica works on: some requests of a job whose arrays it shares with all the others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.engines.replicas.ledger import middle
from blendserve.errors import RequestError
from blendserve.job.pending import PendingRequests
from blendserve.job.store import TokenStore
from blendserve.planner.base import Int64s
from blendserve.planner.plan import Plan
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request


class GivenBackError(RequestError):
    """A request that another replica answers: an engine ends it like one that cannot be served."""

    def __init__(self) -> None:
        super().__init__("given back unstarted", code="given_back", status_code=0)


@dataclass(frozen=True, slots=True)
class SharedJob:
    """A job and its plan as arrays, to be put into shared memory once.

    Shapes: `numbers` int64[num_requests], the request of the store behind every row of the job; `rank`
    int64[num_requests], the place of every row in the plan; `tree` of all rows.
    """

    arrays: Mapping[str, NDArray[Any]]
    max_model_len: int
    numbers: Int64s
    tree: PrefixTree
    rank: Int64s

    @classmethod
    def of(cls, pending: PendingRequests, plan: Plan) -> SharedJob:
        store = pending.store
        return cls(store.arrays, store.max_model_len, pending.numbers, plan.prompt_tree, rank_of(plan))

    @property
    def num_bytes(self) -> int:
        """Of all arrays together."""
        tree = [getattr(self.tree, name) for name in self.tree.__slots__]
        arrays = [*self.arrays.values(), self.numbers, self.rank, *tree]
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def store(self) -> TokenStore:
        """The requests, without a copy."""
        return TokenStore(self.arrays, self.max_model_len)


def rank_of(plan: Plan) -> Int64s:
    """The place of every request in the order of a plan. Shape: int64[num_requests]."""
    rank = np.empty(plan.num_requests, np.int64)
    rank[plan.schedule.order] = np.arange(plan.num_requests)
    return rank


class JobPart(PendingRequests):
    """The rows `requests` (ascending) of a shared job, dense from 0. Another thread may give back what the engine has
    not looked up; looking it up then raises GivenBackError.
    """

    def __init__(self, job: SharedJob, store: TokenStore, requests: Int64s) -> None:
        super().__init__(store, job.numbers[requests])
        self.requests = requests
        self._job = job
        self._lock = threading.Lock()
        self._is_taken = np.zeros(len(requests), np.bool_)  # by the engine, or given back
        self._is_given_back = np.zeros(len(requests), np.bool_)

    def __getitem__(self, index: int, /) -> Request:
        with self._lock:
            if self._is_given_back[index]:
                raise GivenBackError
            self._is_taken[index] = True
        return super().__getitem__(index)

    def prefix_tree(self) -> PrefixTree:
        """Cut from the tree of the job: nothing is sorted again."""
        return self._job.tree.restrict(self.requests)

    def give_back(self, share: float) -> Int64s:
        """Part with `share` of what the engine has not looked up, rounded up. Returns: rows of the job, ascending."""
        with self._lock:
            rows = np.flatnonzero(~self._is_taken)
            in_order = rows[np.argsort(self._job.rank[self.requests[rows]], kind="stable")]
            given = middle(in_order, int(np.ceil(len(rows) * share)))
            self._is_taken[given] = self._is_given_back[given] = True
        return np.sort(self.requests[given])

    def drop(self, requests: Int64s) -> None:
        """Give back those of these rows of the job that the engine has not looked up."""
        rows = np.flatnonzero(np.isin(self.requests, requests))
        with self._lock:
            rows = rows[~self._is_taken[rows]]
            self._is_taken[rows] = self._is_given_back[rows] = True

    def is_given_back(self, index: int) -> bool:
        return bool(self._is_given_back[index])
