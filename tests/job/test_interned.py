"""Sampling parameters that many lines share are kept once, and those that none share do not fill the memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from batch_fakes import SERVED

from blendserve.dialect.schema import BatchLine
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.request import SamplingParams

NUM_LINES, NUM_IDS = 120, 1 << 14
MOST_BYTES = 50 << 20


def lines() -> Iterator[BatchLine]:
    """Half of the lines have long lists of their own, the others share one."""
    for number in range(2 * NUM_LINES):
        own = tuple(range(number * NUM_IDS, (number + 1) * NUM_IDS))
        sampling = SamplingParams(stop_token_ids=own if number % 2 else (7,))
        yield BatchLine(number, f"id-{number}", "/v1/completions", None, ((1,),), sampling)


def test_long_lists_do_not_stay_in_memory(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store")
    tracemalloc.start()
    try:
        for line in lines():
            writer.add(line, [[1]])
        assert tracemalloc.get_traced_memory()[0] < MOST_BYTES
        store = TokenStore.open(tmp_path / "store", writer.finish(), SERVED.max_model_len)
        tracemalloc.reset_peak()
        for number in range(store.num_requests):
            sampling = store.request(number, number).sampling
            assert len(sampling.stop_token_ids) == (NUM_IDS if number % 2 else 1)
        assert tracemalloc.get_traced_memory()[0] < MOST_BYTES
    finally:
        tracemalloc.stop()
