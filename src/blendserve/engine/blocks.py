"""The KV pool as counted references to blocks; knows nothing of tokens, keys or sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import CapacityError

Int32s = NDArray[np.int32]


class BlockPool:
    """`num_blocks` KV blocks of `block_size` tokens. A block is free, or referenced by `ref_counts[block]` tables, or
    unreferenced but kept by the prefix cache, which hands it back through `free`.

    Shapes: `ref_counts` int32[num_blocks].
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self.ref_counts = np.zeros(num_blocks, np.int32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: the first num_free entries

    def allocate(self, count: int) -> Int32s:
        """Take `count` free blocks, each with one reference. Raises: CapacityError, taking none, if fewer are free."""
        if count > self.num_free:
            raise CapacityError(f"{count} KV blocks asked for, {self.num_free} of {self.num_blocks} are free")
        self.num_free -= count
        blocks = self._free[self.num_free : self.num_free + count].copy()
        self.ref_counts[blocks] = 1
        return blocks

    def acquire(self, blocks: Int32s) -> None:
        """Add one reference to each of `blocks`, which are distinct."""
        self.ref_counts[blocks] += 1

    def release(self, blocks: Int32s) -> None:
        """Drop one reference to each of `blocks`, which are distinct; those left without any are not yet free."""
        self.ref_counts[blocks] -= 1

    def free(self, blocks: Int32s) -> None:
        """Return unreferenced `blocks`."""
        end = self.num_free + len(blocks)
        self._free[self.num_free : end] = blocks
        self.num_free = end

    def check(self) -> None:
        """Assert the invariants: no block is free twice, none is both free and referenced."""
        free = self._free[: self.num_free]
        assert len(np.unique(free)) == self.num_free, "a block is free twice"
        assert not self.ref_counts[free].any(), "a free block is referenced"
        assert (self.ref_counts >= 0).all(), "a block was released too often"
