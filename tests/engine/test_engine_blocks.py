"""Block pool: counted references, all-or-nothing allocation."""

from __future__ import annotations

import numpy as np
import pytest

from blendserve.engine.blocks import BlockPool
from blendserve.errors import CapacityError


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    blocks = pool.allocate(3)
    with pytest.raises(CapacityError, match="2 KV blocks asked for, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert len(set(blocks.tolist())) == 3
    assert pool.ref_counts[blocks].tolist() == [1, 1, 1]
    pool.check()


def test_blocks_return_once_nobody_references_them() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    blocks = pool.allocate(4)
    pool.acquire(blocks[:2])
    pool.release(blocks)
    assert pool.ref_counts[blocks].tolist() == [1, 1, 0, 0]
    pool.free(blocks[2:])
    assert set(pool.allocate(2).tolist()) == set(blocks[2:].tolist())
    pool.check()


def test_check_sees_a_block_that_is_free_and_referenced() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    blocks = pool.allocate(2)
    pool.free(blocks[:1])
    with pytest.raises(AssertionError, match="a free block is referenced"):
        pool.check()


def test_check_sees_a_block_that_is_free_twice() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    block = pool.allocate(2)[:1]
    pool.release(block)
    pool.free(np.concatenate((block, block)))
    with pytest.raises(AssertionError, match="free twice"):
        pool.check()
