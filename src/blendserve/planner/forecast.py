"""How full the KV memory will be: the peak that running sequences are heading for, and what one more would make of it.

Every sequence grows by a token per step until it ends, so the load between two ends rises by one line; it peaks just
before an end. Times are absolute steps, which keeps a forecast valid as steps pass. Lengths are distributions: each
sequence is several equally likely ones of a fraction of its size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.cost import Floats

MAX_SPANS = 64
"""Ends are grouped into this many spans, each with its highest load: an admission costs microseconds."""
_SOON = 4.0 ** np.arange(1, 10)  # further borders, in steps from now: a short request must not pay for a late peak


class KvForecast:
    """Expected KV load in tokens over the steps to come, by spans (begin, end] of steps."""

    def __init__(self) -> None:
        self._refused: set[int] = set()
        self._begin = np.zeros(0)
        self._end = np.zeros(0)
        self._load = np.zeros(0)

    def rebuild(self, step: int, kv_tokens: Floats, remaining: Floats) -> None:
        """Forecast from scratch. Shapes: `kv_tokens` [n] held now, `remaining` [n, num_quantiles] tokens to come."""
        self._refused.clear()
        num_quantiles = remaining.shape[1] if remaining.ndim == 2 else 1
        ends = (step + remaining).ravel()
        if not len(ends):
            self._begin = self._end = self._load = np.zeros(0)
            return
        by_end = np.argsort(ends)
        ends = ends[by_end]
        held = np.zeros(len(ends) + 1)
        held[:-1] = np.cumsum((np.repeat(kv_tokens - step, num_quantiles)[by_end] / num_quantiles)[::-1])[::-1]
        count = np.arange(len(ends), -1, -1) / num_quantiles
        times, is_border = self._times(step, ends)
        first_left = np.searchsorted(ends, times)
        load = held[first_left] + count[first_left] * times
        starts = np.flatnonzero(np.concatenate([[True], is_border[:-1]]))
        self._load = np.maximum.reduceat(load, starts)
        self._end = times[np.append(starts[1:] - 1, len(times) - 1)]
        self._begin = np.concatenate([[step], self._end[:-1]])

    @staticmethod
    def _times(step: int, ends: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Moments to look at, ascending: all ends, and some steps from now on; and which of them close a span."""
        chunk = -(-len(ends) // MAX_SPANS)
        is_border = np.zeros(len(ends), dtype=np.bool_)
        is_border[chunk - 1 :: chunk] = True
        soon = step + _SOON[step + _SOON < ends[-1]]
        times = np.concatenate([ends, soon])
        order = np.argsort(times, kind="stable")
        return times[order], np.concatenate([is_border, np.ones(len(soon), dtype=np.bool_)])[order]

    @property
    def peak(self) -> float:
        """Highest load to come, in tokens."""
        return float(self._load.max()) if len(self._load) else 0.0

    @property
    def end(self) -> float:
        """Step at which the last sequence ends."""
        return float(self._end[-1]) if len(self._end) else 0.0

    def fits(self, request: int, step: int, kv_tokens: float, remaining: Floats, limit: float) -> bool:
        """Does the peak stay within `limit` with one more sequence, of equally likely remaining lengths (ascending)?

        What was refused stays refused until the next rebuild: until then the load only grows.
        """
        if request in self._refused:
            return False
        if kv_tokens + remaining[-1] <= limit and (
            not len(self._load) or (self._load + self._added(step, kv_tokens, remaining)).max() <= limit
        ):
            return True
        self._refused.add(request)
        return False

    def add(self, step: int, kv_tokens: float, remaining: Floats) -> None:
        """Count one more sequence in."""
        self._load = self._load + self._added(step, kv_tokens, remaining)
        last = step + float(remaining[-1])
        previous = float(self._end[-1]) if len(self._end) else float(step)
        if last > previous:
            self._begin = np.append(self._begin, previous)
            self._end = np.append(self._end, last)
            self._load = np.append(self._load, kv_tokens + remaining[-1])

    def _added(self, step: int, kv_tokens: float, remaining: Floats) -> Floats:
        """Load of the sequence at the end of each span that it may still run in."""
        share = 1.0 - np.searchsorted(step + remaining, self._begin, side="right") / len(remaining)
        added: Floats = share * (kv_tokens + self._end - step)
        return added
