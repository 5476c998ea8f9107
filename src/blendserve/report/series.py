"""Long series made short enough to draw: steps summed over slices of time, values over slices of an order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run in equal slices of time. Shapes: `edges_s` float64[num_slices + 1], the others float64[num_slices].

    `compute_ms`, `memory_ms`: mean of a step; `compute_share`, `memory_share`: part of the slice in which the resource
    was at work; `kv_share`: mean part of the KV memory in use; `density`: compute over memory time, nan without either;
    `num_prefill_tokens`, `num_decode_tokens`: computed in the slice; `num_running`: mean number of sequences.
    """

    edges_s: Floats
    compute_ms: Floats
    memory_ms: Floats
    compute_share: Floats
    memory_share: Floats
    kv_share: Floats
    density: Floats
    num_steps: Floats
    num_prefill_tokens: Floats
    num_decode_tokens: Floats
    num_running: Floats

    @property
    def middles_s(self) -> Floats:
        return (self.edges_s[:-1] + self.edges_s[1:]) / 2


def slice_steps(steps: Mapping[str, Floats], capacity_tokens: int, num_slices: int) -> Timeline:
    """Cut a step log (`engine.stats.STEP_COLUMNS`) into slices. A step that spans an edge counts on both sides by time,
    so the totals are those of the steps.
    """
    end_s = steps["end_s"]
    num_slices = max(1, min(num_slices, len(end_s)))
    edges_s = np.linspace(0.0, float(end_s[-1]) if len(end_s) else 1.0, num_slices + 1)
    known = np.concatenate(([0.0], end_s))

    def over_slices(per_step: Floats) -> Floats:
        total = np.concatenate(([0.0], np.cumsum(per_step)))
        return np.diff(np.interp(edges_s, known, total))

    width = np.diff(edges_s)
    count = over_slices(np.ones(len(end_s)))
    compute, memory = over_slices(steps["compute_s"]), over_slices(steps["memory_s"])
    kv_tokens = over_slices(steps["num_kv_tokens"] * steps["elapsed_s"]) / width
    with np.errstate(divide="ignore", invalid="ignore"):
        return Timeline(
            edges_s=edges_s,
            compute_ms=1e3 * compute / count,
            memory_ms=1e3 * memory / count,
            compute_share=compute / width,
            memory_share=memory / width,
            kv_share=kv_tokens / max(1, capacity_tokens),
            density=compute / memory,
            num_steps=count,
            num_prefill_tokens=over_slices(steps["num_prefill_tokens"]),
            num_decode_tokens=over_slices(steps["num_decode_tokens"]),
            num_running=over_slices(steps["num_running"] * steps["elapsed_s"]) / width,
        )


class Spread(NamedTuple):
    """Values of an order by slices. Shapes: `edges` float64[num_slices + 1], the others float64[num_slices]."""

    edges: Floats
    low: Floats
    median: Floats
    high: Floats


def spread_along(values: Floats, num_slices: int) -> Spread:
    """Median and middle 90% of each of at most so many equal slices of a sequence."""
    edges = _slice_edges(len(values), num_slices)
    parts = [values[begin:end] for begin, end in pairwise(edges)]
    low, median, high = (
        np.array([np.quantile(part, level, method="inverted_cdf") for part in parts]) for level in (0.05, 0.5, 0.95)
    )
    return Spread(edges.astype(np.float64), low, median, high)


def means_along(values: Floats, num_slices: int) -> tuple[Floats, Floats]:
    """Edges and means of at most so many equal slices of a sequence."""
    edges = _slice_edges(len(values), num_slices)
    return edges.astype(np.float64), np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _slice_edges(length: int, num_slices: int) -> NDArray[np.int64]:
    return np.linspace(0, length, max(1, min(num_slices, length)) + 1).round().astype(np.int64)


def log_histogram(values: NDArray[np.int64] | Floats, num_bins: int = 40) -> tuple[Floats, NDArray[np.int64]]:
    """Edges and counts of bins of equal ratio that hold all positive values."""
    low, high = max(1.0, float(values.min())), float(values.max()) + 1
    edges = np.geomspace(low, max(high, low * 2), num_bins + 1)
    counts, _ = np.histogram(np.maximum(values, low), edges)
    return edges, counts
