"""The two ends of the order: requests leave from the compute end, from the memory end, or out of turn."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np

from blendserve.planner.base import Int64s

NO_REQUEST = -1


class DualScanner:
    """Which request comes next at each end of an order. Both ends walk depth-first, because the order is.

    Requests in `first` are served before others (length samples); they leave from a lane of their own. Preempted
    requests go back to the end they came from and leave first. Looking mutates nothing that a caller can see.
    """

    def __init__(self, order: Int64s, first: Int64s) -> None:
        self._is_waiting = np.zeros(len(order), dtype=np.bool_)
        self._is_waiting[order] = True
        self._num_waiting = len(order)
        self._first = first.tolist()
        self._first.reverse()
        self._returned_to_compute_end: list[int] = []
        self._returned_to_memory_end: list[int] = []
        self.reorder(order)

    def reorder(self, order: Int64s) -> None:
        """Go on with another order of the same requests: those that have left stay out."""
        self._order = order
        self._low, self._high = 0, len(order)
        self._position = np.empty(len(order), dtype=np.int64)
        self._position[order] = np.arange(len(order))
        self._before = np.arange(-1, len(order) - 1)  # a place before each, with nobody waiting between the two

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def is_waiting(self, request: int) -> bool:
        return bool(self._is_waiting[request])

    def waiting(self) -> Int64s:
        """Indices of all requests that wait, ascending."""
        return np.flatnonzero(self._is_waiting)

    def upcoming(self, count: int) -> Int64s:
        """Who waits of the next `count` places at the compute end."""
        self.peek_compute_end()
        places = self._order[self._low : min(self._low + count, self._high)]
        return places[self._is_waiting[places]]

    def upcoming_memory_end(self, count: int) -> Int64s:
        """Who waits of the next `count` places at the memory end."""
        self.peek_memory_end()
        places = self._order[max(self._high - count, self._low) : self._high]
        return places[self._is_waiting[places]]

    def peek_first(self) -> int:
        """The next request of those to be served before others, or NO_REQUEST."""
        while self._first and not self._is_waiting[self._first[-1]]:
            self._first.pop()
        return self._first[-1] if self._first else NO_REQUEST

    def peek_compute_end(self) -> int:
        """The next request at the compute end, or NO_REQUEST."""
        if (returned := self._last_waiting(self._returned_to_compute_end)) != NO_REQUEST:
            return returned
        while self._low < self._high and not self._is_waiting[self._order[self._low]]:
            self._low += 1
        if self._low < self._high:
            return int(self._order[self._low])
        return self._last_waiting(self._returned_to_memory_end)

    def peek_memory_end(self) -> int:
        """The next request at the memory end, or NO_REQUEST."""
        if (returned := self._last_waiting(self._returned_to_memory_end)) != NO_REQUEST:
            return returned
        while self._low < self._high and not self._is_waiting[self._order[self._high - 1]]:
            self._high -= 1
        if self._low < self._high:
            return int(self._order[self._high - 1])
        return self._last_waiting(self._returned_to_compute_end)

    def look_past_memory_end(self, distance: int) -> int:
        """A waiting request that many places before the memory end, or the next one before it; NO_REQUEST past the
        other end."""
        position = self._waiting_at_or_before(self._high - 1 - distance)
        return int(self._order[position]) if position >= self._low else NO_REQUEST

    def first_at_memory_end(self, count: int) -> list[int]:
        """The next `count` requests at the memory end, or as many as there are."""
        self.peek_memory_end()
        requests: list[int] = []
        position = self._high
        while len(requests) < count and (position := self._waiting_at_or_before(position - 1)) >= self._low:
            requests.append(int(self._order[position]))
        return requests

    def _waiting_at_or_before(self, position: int) -> int:
        """The last place up to `position` where somebody waits, or one before the compute end. Mutates: the links that
        lead over places that are empty for good, so that no walk is long twice."""
        passed: list[int] = []
        while position >= self._low and not self._is_waiting[self._order[position]]:
            passed.append(position)
            position = int(self._before[position])
        if len(passed) > 1:
            self._before[passed] = position
        return position

    def take(self, request: int) -> None:
        """A request leaves."""
        assert self._is_waiting[request], f"request {request} left twice"
        self._is_waiting[request] = False
        self._num_waiting -= 1

    def put_back(self, request: int, *, at_memory_end: bool) -> None:
        """A request that left comes back, next in line at its end."""
        assert not self._is_waiting[request], f"request {request} came back twice"
        self._is_waiting[request] = True
        self._num_waiting += 1
        (self._returned_to_memory_end if at_memory_end else self._returned_to_compute_end).append(request)

    def distance(self, first: int, last: int) -> float:
        """Requests to pass at the nearer end before one of order[first:last] is next; infinite where none is left.

        Who came back is next."""
        returned = chain(self._returned_to_compute_end, self._returned_to_memory_end)
        if any(first <= self._position[request] < last for request in returned):
            return 0.0
        begin, end = max(first, self._low), min(last, self._high)
        if begin >= end or not self._num_waiting:
            return math.inf
        return float(min(begin - self._low, self._high - end))

    def _last_waiting(self, returned: list[int]) -> int:
        """The latest request that came back and still waits: it may have left again out of turn. Mutates: `returned`,
        which loses those that have left."""
        while returned and not self._is_waiting[returned[-1]]:
            returned.pop()
        return returned[-1] if returned else NO_REQUEST
