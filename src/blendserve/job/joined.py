"""Pending requests of several jobs as those of one, so that they are planned and run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.job.pending import PendingRequests
from blendserve.job.store import TokenStore
from blendserve.planner.base import Int64s


class JoinedRequests(NamedTuple):
    """Requests of several jobs in the order of the jobs. Shapes: `ends` int64[num_jobs], where the rows of each end."""

    pending: PendingRequests
    parts: Sequence[PendingRequests]
    ends: Int64s

    def place_of(self, index: int) -> tuple[int, int]:
        """The job of a row, and the request's number in the store of that job."""
        job = int(np.searchsorted(self.ends, index, side="right"))
        begin = int(self.ends[job - 1]) if job else 0
        return job, int(self.parts[job].numbers[index - begin])


def join_pending(parts: Sequence[PendingRequests]) -> JoinedRequests:
    """One job's requests stay as they are; those of several are copied into one store in memory."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    if len(parts) == 1:
        return JoinedRequests(parts[0], parts, ends)
    store = _joined_store([part.store for part in parts])
    firsts = np.cumsum([0, *(part.store.num_requests for part in parts[:-1])], dtype=np.int64)
    numbers = np.concatenate([part.numbers + first for part, first in zip(parts, firsts, strict=True)])
    return JoinedRequests(PendingRequests(store, numbers), parts, ends)


def _joined_store(stores: Sequence[TokenStore]) -> TokenStore:
    """The lines of all stores, one store after the other; offsets are moved up."""
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([store.arrays[name] for store in stores])
        for name in stores[0].arrays
        if name not in ("prompt_ends", "lines")
    }
    begins = {name: _begins([store.arrays[name] for store in stores]) for name in stores[0].arrays}
    arrays["prompt_ends"] = np.concatenate(
        [store.arrays["prompt_ends"] + begin for store, begin in zip(stores, begins["tokens"], strict=True)]
    )
    all_lines = []
    for at, store in enumerate(stores):
        lines = np.array(store.arrays["lines"])
        for field, name in (
            ("first_prompt", "prompt_ends"),
            ("id_offset", "custom_ids"),
            ("sampling_offset", "sampling"),
            ("body_offset", "bodies"),
        ):
            lines[field] += begins[name][at]
        all_lines.append(lines)
    arrays["lines"] = np.concatenate(all_lines)
    return TokenStore(arrays, stores[0].max_model_len)


def _begins(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each array begins once they stand one after the other."""
    return [0, *np.cumsum([len(array) for array in arrays[:-1]]).tolist()]
