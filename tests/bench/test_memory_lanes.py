"""The emulation of memory lanes against cases that can be worked out."""

from __future__ import annotations

import pytest
from memory_lanes import CHUNK_BYTES, Server, together_s

FAST = Server(4, bytes_per_s=1e15, core_bytes_per_s=1e15, cache_bytes_per_s=1e18)
SCARCE = Server(8, bytes_per_s=30e9)


def test_tiles_alone_share_the_cores() -> None:
    assert together_s(FAST, 8, 0, 4) == pytest.approx(2 * FAST.tile_s)


def test_chunks_alone_take_what_bandwidth_allows() -> None:
    assert together_s(SCARCE, 0, 16, 8) == pytest.approx(16 * CHUNK_BYTES / 30e9, rel=0.01)


def test_fetches_that_cost_nothing_are_hidden() -> None:
    assert together_s(FAST, 8, 8, 4) == pytest.approx(2 * FAST.tile_s, rel=1e-3)


def test_nothing_beats_either_resource_alone() -> None:
    tiles, chunks = 160, 60
    bound_s = max(tiles * SCARCE.tile_s / 8, chunks * CHUNK_BYTES / 30e9)
    for lanes in (1, 2, 4, 8):
        assert bound_s <= together_s(SCARCE, tiles, chunks, lanes) <= SCARCE.apart_s(tiles, chunks) * 1.5


def test_few_lanes_are_better_where_bandwidth_is_scarce() -> None:
    tiles = 160
    chunks = round(tiles * SCARCE.tile_s / 8 * 30e9 / CHUNK_BYTES)
    assert together_s(SCARCE, tiles, chunks, 2) < 0.9 * together_s(SCARCE, tiles, chunks, 8)
