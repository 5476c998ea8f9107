"""What several batches have left, as one plan sees it; a batch may be withdrawn while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blendserve.errors import RequestError
from blendserve.job.joined import join_pending
from blendserve.job.pending import PendingRequests
from blendserve.request import Request

WITHDRAWN = "withdrawn"


class RoundRequests(PendingRequests):
    """The requests of a round, dense from 0. A row of a withdrawn part raises RequestError when an engine starts on it,
    so that it costs nothing.
    """

    def __init__(self, parts: Sequence[PendingRequests], is_withdrawn: Callable[[int], bool]) -> None:
        self._joined = join_pending(parts)
        super().__init__(self._joined.pending.store, self._joined.pending.numbers)
        self._is_withdrawn = is_withdrawn

    def place_of(self, index: int) -> tuple[int, int]:
        """The part of a row, and its request number in the store of that part."""
        return self._joined.place_of(index)

    def __getitem__(self, index: int, /) -> Request:
        part, _ = self.place_of(index)
        if self._is_withdrawn(part):
            raise RequestError("the request was withdrawn", code=WITHDRAWN)
        return super().__getitem__(index)
