"""When steps ran by the wall clock, and what every worker did in some of them. Bounded, however long the run.

Spans of every step are kept until there are too many; then those of every second step, every fourth and so on, so that
what is kept always covers the whole run evenly.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

SPAN_COLUMNS = ("worker", "op", "layer", "nano_batch", "begin_ns", "end_ns", "busy_ns")
"""Columns of the spans of a step: tiles of one op that a worker ran one after the other (csrc/trace.h)."""

MAX_SPANS = 120_000


class StepSpans(NamedTuple):
    """One traced step. Shapes: `spans` int64[number of spans, len(SPAN_COLUMNS)]."""

    step: int
    spans: Int64s


class StepTrace:
    """Times of all steps, spans of some. `max_spans` 0: no spans are wanted. Units: seconds of the monotonic clock."""

    def __init__(self, max_spans: int = 0) -> None:
        self.max_spans = max_spans
        self.stride = 1
        self._begin_s = array("d")
        self._end_s = array("d")
        self._kept: list[StepSpans] = []
        self._num_spans = 0

    def __len__(self) -> int:
        return len(self._begin_s)

    @property
    def wants_spans(self) -> bool:
        """Are the spans of the step that comes next to be kept?"""
        return self.max_spans > 0 and len(self) % self.stride == 0

    @property
    def kept(self) -> tuple[StepSpans, ...]:
        """Steps whose spans are kept: every `stride`-th."""
        return tuple(self._kept)

    @property
    def first_begin_s(self) -> float:
        """When the first step began."""
        return self._begin_s[0]

    @property
    def begin_s(self) -> NDArray[np.float64]:
        return np.array(self._begin_s)

    @property
    def end_s(self) -> NDArray[np.float64]:
        return np.array(self._end_s)

    def add(self, begin_s: float, end_s: float, spans: Int64s | None = None) -> None:
        """Enter the next step. Thins out what is kept where there are more than `max_spans` spans."""
        if spans is not None and self.wants_spans:
            self._kept.append(StepSpans(len(self), spans))
            self._num_spans += len(spans)
        self._begin_s.append(begin_s)
        self._end_s.append(end_s)
        while self._num_spans > self.max_spans and len(self._kept) > 1:
            self.stride *= 2
            self._kept = [kept for kept in self._kept if kept.step % self.stride == 0]
            self._num_spans = sum(len(kept.spans) for kept in self._kept)
