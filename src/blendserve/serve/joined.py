"""Requests of several batches as one store, so that one plan covers them and prefixes that they share run once.

Answers depend on a request alone, so a joined request answers as it would in its own batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import RequestError
from blendserve.job.pending import PendingRequests
from blendserve.job.store import TokenStore
from blendserve.planner.base import Int64s
from blendserve.request import Request

_OFFSETS = {
    "first_prompt": "prompt_ends",
    "id_offset": "custom_ids",
    "sampling_offset": "sampling",
    "body_offset": "bodies",
}
"""Columns of a line that point into another array."""

WITHDRAWN = "withdrawn"


def join_stores(stores: Sequence[TokenStore]) -> TokenStore:
    """One store that holds the lines of all, in their order. Line numbers stay those of each file."""
    if len(stores) == 1:
        return stores[0]
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([store.arrays[name] for store in stores]) for name in stores[0].arrays
    }
    lines, prompt_ends = arrays["lines"].copy(), arrays["prompt_ends"].copy()
    bases = dict.fromkeys(("tokens", *_OFFSETS.values()), 0)
    first_line = 0
    for store in stores:
        part = slice(first_line, first_line + store.num_lines)
        for column, name in _OFFSETS.items():
            lines[column][part] += bases[name]
        num_prompts = len(store.arrays["prompt_ends"])
        prompt_ends[bases["prompt_ends"] : bases["prompt_ends"] + num_prompts] += bases["tokens"]
        for name in bases:
            bases[name] += len(store.arrays[name])
        first_line += store.num_lines
    return TokenStore({**arrays, "lines": lines, "prompt_ends": prompt_ends}, stores[0].max_model_len)


class JoinedRequests(PendingRequests):
    """What several batches have left, dense from 0. A row of a withdrawn part raises RequestError when an engine starts
    on it, so that it costs nothing.

    Shapes: `numbers[i]` are the requests of part i's own store that are left.
    """

    def __init__(
        self, stores: Sequence[TokenStore], numbers: Sequence[Int64s], is_withdrawn: Callable[[int], bool]
    ) -> None:
        first_requests = np.cumsum([0, *(store.num_requests for store in stores)])
        joined = [first + of_part for first, of_part in zip(first_requests, numbers, strict=False)]
        super().__init__(join_stores(stores), np.concatenate(joined).astype(np.int64))
        self._own_numbers = np.concatenate(numbers).astype(np.int64)
        self._ends = np.cumsum([len(of_part) for of_part in numbers])
        self._is_withdrawn = is_withdrawn

    def place_of(self, index: int) -> tuple[int, int]:
        """The part of a row, and its request number there."""
        return int(np.searchsorted(self._ends, index, side="right")), int(self._own_numbers[index])

    def __getitem__(self, index: int, /) -> Request:
        part, _ = self.place_of(index)
        if self._is_withdrawn(part):
            raise RequestError("the request was withdrawn", code=WITHDRAWN)
        return super().__getitem__(index)
