"""Jobs of more requests than one plan should hold: windows that are planned and run one after the other.

A window is a range of prompts in lexicographic order, so that prompts with a common beginning meet in one window and
the windows share next to nothing. Where the ranges end is guessed from prompts drawn evenly over the job.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from blendserve.job.pending import PendingRequests
from blendserve.planner.base import Int64s

MAX_PLANNED_REQUESTS = 500_000
"""A plan takes about 500 bytes of memory for each request of a short prompt. A window this long loses nothing at its
ends."""
_NUM_DRAWN = 1 << 16
_CHUNK_REQUESTS = 1 << 14
_SLACK = 1.25
"""How much longer than the others a window may become by bad luck before it is cut."""


def windows_of(pending: PendingRequests, max_requests: int) -> list[Int64s]:
    """The rows of `pending` by window, each of them ascending; one window where there are few."""
    num_windows = -(-len(pending) // max_requests)
    if num_windows <= 1:
        return [np.arange(len(pending))]
    window_of = _window_of_each(pending, _ends(pending, num_windows))
    windows = (np.flatnonzero(window_of == window) for window in range(num_windows))
    return [part for rows in windows for part in _cut(rows, int(_SLACK * max_requests))]


def _ends(pending: PendingRequests, num_windows: int) -> list[bytes]:
    """The prompts, as keys, at which the windows but the first begin."""
    rows = np.unique(np.linspace(0, len(pending) - 1, _NUM_DRAWN).astype(np.int64))
    keys = sorted(key for part in _chunks(rows) for key in _keys(pending, part))
    return [keys[window * len(keys) // num_windows] for window in range(1, num_windows)]


def _window_of_each(pending: PendingRequests, ends: list[bytes]) -> NDArray[np.uint16]:
    found = np.empty(len(pending), np.uint16)
    for rows in _chunks(np.arange(len(pending))):
        found[rows] = [bisect_right(ends, key) for key in _keys(pending, rows)]
    return found


def _keys(pending: PendingRequests, rows: Int64s) -> Iterator[bytes]:
    """Prompts as texts of bytes that compare as their tokens do."""
    prompts = pending.store.flat_prompts(pending.numbers[rows])
    data = prompts.token_ids.astype(">i4").tobytes()
    for begin, end in pairwise((prompts.offsets * 4).tolist()):
        yield data[begin:end]
    pending.store.release()


def _chunks(rows: Int64s) -> Iterator[Int64s]:
    for begin in range(0, len(rows), _CHUNK_REQUESTS):
        yield rows[begin : begin + _CHUNK_REQUESTS]


def _cut(rows: Int64s, most: int) -> list[Int64s]:
    """A window that has become too long, as of many equal prompts, in even parts."""
    return [part for part in np.array_split(rows, max(1, -(-len(rows) // most))) if len(part)]
