"""How full the KV memory will be: the peak that running sequences are heading for, and what one more would make of it.

Every sequence grows by a token per step until it ends, so the load between two ends rises by one line; it peaks just
before an end. Times are absolute steps, which keeps a forecast valid as steps pass. Lengths are distributions: each
sequence is several equally likely ones of a fraction of its size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.model_cost import Floats

MAX_SPANS = 64
"""Ends are grouped into this many spans, each with its highest load: an admission costs microseconds."""
_SOON = 4.0 ** np.arange(1, 10)  # further borders, in steps from now: a short request must not pay for a late peak


class KvForecast:
    """Expected KV load in tokens over the steps to come, by spans (begin, end] of steps.

    `growth` is how many sequences run through a span, so that the load inside it is known; 0 where several ends were
    grouped, whose load is taken for constant.
    """

    def __init__(self) -> None:
        self._refused: set[int] = set()
        self._begin = np.zeros(0)
        self._end = np.zeros(0)
        self._load = np.zeros(0)
        self._growth = np.zeros(0)

    def rebuild(self, step: int, kv_tokens: Floats, remaining: Floats) -> None:
        """Forecast from scratch. Shapes: `kv_tokens` [n] held now, `remaining` [n, num_quantiles] tokens to come."""
        self._refused.clear()
        num_quantiles = remaining.shape[1] if remaining.ndim == 2 else 1
        ends = (step + remaining).ravel()
        if not len(ends):
            self._begin = self._end = self._load = self._growth = np.zeros(0)
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
        last = np.append(starts[1:] - 1, len(times) - 1)
        self._end = times[last]
        self._growth = np.where(starts == last, count[first_left[last]], 0.0)
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

    def fits(self, request: int, step: int, kv_tokens: float, remaining: Floats, limit: float) -> bool:
        """Does the load stay within `limit` for as long as one more sequence runs? Its remaining lengths are equally
        likely, ascending.

        What was refused stays refused until the next rebuild: until then the load only grows.
        """
        if request in self._refused:
            return False
        if kv_tokens + remaining[-1] <= limit and self._peak_beside(step, kv_tokens, remaining) <= limit:
            return True
        self._refused.add(request)
        return False

    def _peak_beside(self, step: int, kv_tokens: float, remaining: Floats) -> float:
        """Highest load of all sequences while the given one runs."""
        if not len(self._load):
            return 0.0
        if len(remaining) > 1:
            added = self._added(step, kv_tokens, remaining)
            return float(np.where(added > 0, self._load + added, 0.0).max())
        end = step + float(remaining[0])
        span = int(np.searchsorted(self._end, end))
        peak = float((self._load[:span] + self._end[:span]).max()) + kv_tokens - step if span else 0.0
        if span < len(self._end):
            peak = max(peak, self._load_inside(span, end) + kv_tokens + float(remaining[0]))
        return peak

    def _load_inside(self, span: int, time: float) -> float:
        return float(self._load[span] - self._growth[span] * (self._end[span] - time))

    def _split(self, time: float) -> None:
        """Make `time` the end of a span, where the load inside its span is known."""
        span = int(np.searchsorted(self._end, time))
        if span == len(self._end) or not self._growth[span] or not self._begin[span] < time < self._end[span]:
            return
        self._load = np.insert(self._load, span, self._load_inside(span, time))
        self._end = np.insert(self._end, span, time)
        self._growth = np.insert(self._growth, span, self._growth[span])
        self._begin = np.insert(self._begin, span + 1, time)

    def add(self, step: int, kv_tokens: float, remaining: Floats) -> None:
        """Count one more sequence in."""
        if len(remaining) == 1:
            self._split(step + float(remaining[0]))
        self._load = self._load + self._added(step, kv_tokens, remaining)
        self._growth = np.where(self._growth > 0, self._growth + self._share(step, remaining), 0.0)
        last = step + float(remaining[-1])
        previous = float(self._end[-1]) if len(self._end) else float(step)
        if last > previous:
            self._begin = np.append(self._begin, previous)
            self._end = np.append(self._end, last)
            self._load = np.append(self._load, kv_tokens + remaining[-1])
            self._growth = np.append(self._growth, 1.0 / len(remaining))

    def _added(self, step: int, kv_tokens: float, remaining: Floats) -> Floats:
        """Load of the sequence at the end of each span that it may still run in."""
        added: Floats = self._share(step, remaining) * (kv_tokens + self._end - step)
        return added

    def _share(self, step: int, remaining: Floats) -> Floats:
        """Probability that the sequence runs beyond the begin of each span."""
        share: Floats = 1.0 - np.searchsorted(step + remaining, self._begin, side="right") / len(remaining)
        return share
