"""What several batches have left, as one plan sees it; a batch may be withdrawn while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from blendserve.job.joined import join_pending
from blendserve.job.pending import PendingRequests, withdrawn_error
from blendserve.planner.base import Int64s
from blendserve.request import Request


class RoundRequests(PendingRequests):
    """The requests of a round, dense from 0. `is_withdrawn` tells of a part that nobody wants any more, `is_yielding`
    that nothing more may begin. Such a row raises RequestError when an engine starts on it, so that it costs nothing;
    one that an engine has started on stays there.
    """

    def __init__(
        self,
        parts: Sequence[PendingRequests],
        is_withdrawn: Callable[[int], bool],
        is_yielding: Callable[[], bool] = lambda: False,
    ) -> None:
        self._joined = join_pending(parts)
        super().__init__(self._joined.pending.store, self._joined.pending.numbers)
        self._is_withdrawn = is_withdrawn
        self._is_yielding = is_yielding
        self._told: set[int] = set()
        self._is_begun = np.zeros(len(self), np.bool_)

    def place_of(self, index: int) -> tuple[int, int]:
        """The part of a row, and its request number in the store of that part."""
        return self._joined.place_of(index)

    @property
    def can_be_withdrawn(self) -> bool:
        return True

    @property
    def begins_no_more(self) -> bool:
        return self._is_yielding()

    def dropped(self) -> Int64s:
        ends = self._joined.ends
        parts = [part for part in range(len(ends)) if part not in self._told and self._is_withdrawn(part)]
        self._told.update(parts)
        rows = [np.arange(int(ends[part - 1]) if part else 0, int(ends[part])) for part in parts]
        return np.concatenate(rows) if rows else super().dropped()

    def __getitem__(self, index: int, /) -> Request:
        if not self._is_begun[index]:
            part, _ = self.place_of(index)
            if self._is_yielding() or self._is_withdrawn(part):
                raise withdrawn_error()
            self._is_begun[index] = True
        return super().__getitem__(index)
